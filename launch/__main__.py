"""`python -m launch`: start runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch", description="Start training runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    local = commands.add_parser("local", help="train on this machine, one process for each GPU (two without a GPU)")
    local.add_argument("--processes", type=_positive, default=None, help="number of processes")
    local.add_argument("--plan", action="store_true", help="check and plan the run, print it, and start nothing")
    local.add_argument("--config", metavar="FILE", help="a run's config.yaml: its values, with overrides on top")
    demo = commands.add_parser("demo", help="prepare, train, score, sample and report on text that is already here")
    for command in (local, demo):
        command.add_argument("overrides", nargs="*", help="what `python -m train` takes: key=value ...")
    options = parser.parse_args(arguments)
    # Importing torch takes seconds, which the help does without.
    from conf import ConfigError
    from data_pipeline.errors import DataError
    from launch.local import default_processes, train_locally
    from train.command import Command

    try:
        if options.command == "demo":
            from launch.demo import run_demo

            return run_demo(options.overrides)
        config = None if options.config is None else Path(options.config)
        given = Command(options.overrides, options.plan, config)
        return train_locally(given, options.processes or default_processes())
    except ConfigError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2
    except DataError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 1


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m launch`: start runs, and make scaling laws of many."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from conf import ConfigError
from conf.command_line import exit_code, parse_arguments
from conf.lasting_output import lasting_output
from conf.passwords import without_passwords
from data_pipeline.errors import DataError, MachineError
from launch.arguments import positive
from launch.queue_commands import QUEUE_COMMANDS, add_queue_commands, run_queue_command
from launch.reproduce.arguments import add_reproduce_command
from launch.scaling.command import add_sweep_commands, run_sweep_command
from train.stop_requests import OUTSIDE_TRAINING, SignalListener, answered_signals


def main(arguments: list[str]) -> int:
    purpose = "Start training runs, and make scaling laws of many."
    parser = argparse.ArgumentParser(prog="python -m launch", description=purpose)
    commands = parser.add_subparsers(dest="command", required=True)
    local = commands.add_parser("local", help="train on this machine, one process for each GPU (two without a GPU)")
    local.add_argument("--processes", type=positive, default=None, help="number of processes")
    local.add_argument("--plan", action="store_true", help="check and plan the run, print it, and start nothing")
    local.add_argument("--config", metavar="FILE", help="a run's config.yaml: its values, with overrides on top")
    demo = commands.add_parser("demo", help="prepare, train, score, sample and report on text that is already here")
    for command in (local, demo):
        command.add_argument("overrides", nargs="*", help="what `python -m train` takes: key=value ...")
    calibrate = commands.add_parser("calibrate", help="measure this machine's GPU, for the plans of runs on its kind")
    calibrate.add_argument("overrides", nargs="*", help="output=FILE seconds=N (conf/calibrate.yaml)")
    plan = commands.add_parser(
        "plan", help="what a run would take of GPUs that need not be there: nodes=N key=value ..."
    )
    plan.add_argument("--json", action="store_true", help="for programs")
    plan.add_argument("--config", metavar="FILE", help="a run's config.yaml: its values, with overrides on top")
    plan.add_argument("overrides", nargs="*", help="what `python -m train` takes, and the keys of conf/plan.yaml")
    add_reproduce_command(commands)
    add_queue_commands(commands)
    add_sweep_commands(commands)
    options = parse_arguments(parser, arguments)
    if options.command == "sweep":
        interrupted = "launch: interrupted; the same command begins again"
        return exit_code(
            lambda: run_sweep_command(options), (MachineError, OSError), interrupted, (DataError, ValueError)
        )
    if options.command == "reproduce":
        interrupted = "launch: interrupted; the same command goes on"
        return exit_code(lambda: _reproduce(options), (MachineError, OSError), interrupted, (DataError, ValueError))
    if options.command in QUEUE_COMMANDS:
        interrupted = "launch: interrupted; jobs that are in the queue stay there"
        return exit_code(
            lambda: run_queue_command(options), (MachineError, OSError), interrupted, (DataError, ValueError)
        )
    if options.command == "calibrate":
        interrupted = "launch: interrupted; nothing was written"
        return exit_code(lambda: _calibrate(options.overrides), (OSError, RuntimeError, ArithmeticError), interrupted)
    if options.command == "plan":
        return exit_code(lambda: _plan(options), (OSError,), "launch: interrupted")
    with lasting_output() as output:
        if options.command == "demo":
            return _exit_code(lambda: _demo(options.overrides))
        with SignalListener(answered_signals(), lambda number: OUTSIDE_TRAINING.answer(number, output)):
            return _exit_code(lambda: _local(options))


# Importing torch takes seconds, which the help does without.
def _local(options: argparse.Namespace) -> int:
    from launch.local import default_processes, train_locally
    from train.command import Command

    config = None if options.config is None else Path(options.config)
    given = Command(options.overrides, options.plan, config)
    return train_locally(given, options.processes or default_processes())


def _demo(overrides: list[str]) -> int:
    from launch.demo import run_demo

    return run_demo(overrides)


def _calibrate(overrides: list[str]) -> int:
    from launch.calibrate import calibrate

    return calibrate(overrides)


def _reproduce(options: argparse.Namespace) -> int:
    from launch.reproduce.command import reproduce

    return reproduce(options)


def _plan(options: argparse.Namespace) -> int:
    from launch.planner.command import Planning, show_plan

    base = None if options.config is None else Path(options.config)
    return show_plan(Planning(options.overrides, base, options.json))


def _exit_code(command: Callable[[], int]) -> int:
    try:
        return command()
    except ConfigError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2
    except (DataError, OSError) as error:
        print(without_passwords(f"launch: {error}"), file=sys.stderr)
        return 1 if isinstance(error, (MachineError, OSError)) else 2
    except KeyboardInterrupt:
        print("launch: interrupted; the same command goes on", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Command line: `python -m train.checkpoint list|keep|release`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from conf.command_line import exit_code, parse_arguments, refuse_undecodable
from train.interpreter import python_name

LIST_HELP = """\
The checkpoints of a run, oldest first: completed steps, when they were saved (UTC), size, and which are kept for good,
or are links to another place.

example:
  python -m train.checkpoint list runs/first
"""
KEEP_HELP = """\
Keep checkpoints for good: nothing deletes them, whatever checkpoint.keep_last says. The run may go on meanwhile.

  RUN@STEP        the run's checkpoint of so many completed steps; RUN alone: its newest; or a checkpoint's directory

example:
  python -m train.checkpoint keep runs/first@1000 runs/first@2000
"""
RELEASE_HELP = """\
Undo keep: the run deletes these checkpoints when their turn comes.

  RUN@STEP        as in keep

example:
  python -m train.checkpoint release runs/first@1000
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 2 for a wrong command, or a checkpoint that does not exist."""
    options = parse_arguments(_parser(), arguments)

    def run() -> int:
        refuse_undecodable(arguments)
        return int(options.run(options))

    return exit_code(run, (OSError,), "interrupted")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train.checkpoint", description="Look after a run's checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, summary: str, text: str, run: Callable[[argparse.Namespace], int]
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        added.set_defaults(run=run)
        return added

    listing = command("list", "the checkpoints of a run", LIST_HELP, _list)
    listing.add_argument("run_directory", metavar="RUN", type=Path, help="a run's directory")
    for name, summary, text, run in (
        ("keep", "keep checkpoints for good", KEEP_HELP, _keep),
        ("release", "undo keep", RELEASE_HELP, _release),
    ):
        added = command(name, summary, text, run)
        added.add_argument("checkpoints", metavar="RUN@STEP", nargs="+", help="checkpoints, see above")
    return parser


def _list(options: argparse.Namespace) -> int:
    from conf import ConfigError
    from model.locate import step_folders, step_of
    from model.marker import COMPLETE
    from train.checkpoints.layout import is_kept
    from train.run_directory import RunDirectory

    root = RunDirectory(options.run_directory).checkpoints
    if not root.is_dir():
        raise ConfigError([f"{options.run_directory}: no run's directory, it has no folder {root.name}"])
    folders = step_folders(root)
    if not folders:
        print(f"{options.run_directory} has no checkpoint yet")
        return 0
    print(f"{'step':>10}  {'saved (UTC)':<19}  {'size':>10}")
    for folder in folders:
        marker, size = folder / COMPLETE, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        saved = _time(marker) if marker.is_file() else "incomplete"
        note = f"  link to {os.path.realpath(folder)}" if folder.is_symlink() else "  kept" if is_kept(folder) else ""
        print(f"{step_of(folder):>10}  {saved:<19}  {size / 2**20:>6,.1f} MiB{note}")
    return 0


def _time(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(path.stat().st_mtime))


def _keep(options: argparse.Namespace) -> int:
    from train.checkpoints.layout import keep

    return _for_each(
        options.checkpoints, keep, f"is kept for good; `{python_name()} -m train.checkpoint release {{}}` undoes it"
    )


def _release(options: argparse.Namespace) -> int:
    from train.checkpoints.layout import release

    return _for_each(options.checkpoints, release, "is no longer kept; the run deletes it when its turn comes")


def _for_each(references: Sequence[str], change: Callable[[Path], None], outcome: str) -> int:
    """`change` all checkpoints, or none where one of them does not exist."""
    folders = _find(references)
    for folder in folders:
        _change(folder, change)
        print(f"{folder} {outcome.format(shlex.quote(str(folder)))}")
    return 0


def _find(references: Sequence[str]) -> list[Path]:
    from conf import ConfigError
    from model.locate import locate
    from model.weights import WeightsError

    found, problems = [], []
    for reference in references:
        try:
            located = locate(reference)
        except WeightsError as error:
            problems.append(str(error))
            continue
        if located.checkpoint is None or located.run is None:
            problems.append(f"{reference} is no checkpoint in a run's directory; name RUN@STEP")
        else:
            found.append(located.checkpoint)
    if problems:
        raise ConfigError(problems)
    return found


def _change(folder: Path, change: Callable[[Path], None]) -> None:
    from conf import ConfigError
    from model.marker import COMPLETE
    from train.checkpoints.layout import deciding_what_stays

    with deciding_what_stays(folder.parent):
        # The run may have deleted it since it was found.
        if not (folder / COMPLETE).is_file():
            raise ConfigError([f"{folder} has just been deleted by its run; name one that `list` shows"])
        change(folder)


if __name__ == "__main__":
    sys.exit(main())

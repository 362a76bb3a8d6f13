"""Command line: `python -m train.checkpoint list|verify|describe|consolidate|fetch|prune|keep|release`."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conf.command_line import exit_code, parse_arguments, refuse_undecodable
from conf.passwords import without_passwords
from train.interpreter import python_name

# PyTorch takes a while to import: each command does so, the help does not.
if TYPE_CHECKING:
    from model.locate import Located

LIST_HELP = """\
The checkpoints of a run, oldest first: completed steps, when they were saved (UTC), size, and which are kept for good,
or are links to another place.

example:
  python -m train.checkpoint list runs/first
"""
VERIFY_HELP = """\
Check checkpoints: size and checksum of every file that the marker lists, that each can be read as what it should be,
and that every number is finite. Ends with 1 where something is wrong, and says what.

  RUN@STEP        the run's checkpoint of so many completed steps; RUN alone: its newest; or a checkpoint's directory

examples:
  python -m train.checkpoint verify runs/first
  python -m train.checkpoint verify runs/first --all
"""
DESCRIBE_HELP = """\
What a checkpoint holds: step, tokens, parameters and their dtype, the layout that wrote it, its place in the data, its
format, and its size by kind.

  RUN@STEP        as in verify

examples:
  python -m train.checkpoint describe runs/first
  python -m train.checkpoint describe runs/first@1000 --json
"""
CONSOLIDATE_HELP = """\
Write the weights of a checkpoint as whole tensors under the names of the model's parameters: model.safetensors, or
several files and their index, beside model.json and the tokenizer. One parameter is in memory at a time. Commands that
take a model (generate, export, initialise_from) take the result; for transformers there is `python -m model export`.

  RUN@STEP        as in verify

examples:
  python -m train.checkpoint consolidate runs/first --output whole
  python -m train.checkpoint consolidate runs/first@1000 --output whole --dtype bfloat16 --file-gib 0
"""
FETCH_HELP = """\
Bring a checkpoint from a mirror (checkpoint.mirror of a run) to this machine: every byte is compared with the checksums
of the checkpoint. Commands then take the folder as a run's: resume_from=DIR, `python -m train.evaluate DIR`.

  MIRROR          a path or a URL, as in checkpoint.mirror
  NAME@STEP       the run's name and completed steps; NAME alone: its newest checkpoint there

examples:
  python -m train.checkpoint fetch s3://bucket/runs first --output fetched/first
  python -m train.checkpoint fetch /backup/runs first@1000 --output fetched/first
"""
PRUNE_HELP = """\
Delete old checkpoints of a run that is not under way. What stays: the newest that are whole, so many of them; those at
multiples of a step; those that the run would not delete either (the best by checkpoint.keep_best, those before a decay,
one that it may go back to); those that `keep` keeps, and links. Damaged ones that are newer are named and left.

examples:
  python -m train.checkpoint prune runs/first --keep-last 2 --dry-run
  python -m train.checkpoint prune runs/first --keep-last 1 --keep-every 10000
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
    verify = command("verify", "check the files and numbers of checkpoints", VERIFY_HELP, _verify)
    verify.add_argument("checkpoints", metavar="RUN@STEP", nargs="+", help="checkpoints, see above")
    verify.add_argument("--all", action="store_true", help="all checkpoints of each RUN that is named")
    describe = command("describe", "what a checkpoint holds", DESCRIBE_HELP, _describe)
    describe.add_argument("checkpoint", metavar="RUN@STEP", help="a checkpoint, see above")
    describe.add_argument("--json", action="store_true", help="print JSON, with the size of every file")
    whole = command("consolidate", "write whole weights", CONSOLIDATE_HELP, _consolidate)
    whole.add_argument("checkpoint", metavar="RUN@STEP", help="a checkpoint, see above")
    whole.add_argument("--output", required=True, metavar="DIR", help="must not exist yet, or be empty")
    whole.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    whole.add_argument(
        "--file-gib", type=_not_negative, default=4.0, metavar="N", help="of one file; 0: one file (default: 4)"
    )
    fetch = command("fetch", "bring a checkpoint from a mirror", FETCH_HELP, _fetch)
    fetch.add_argument("mirror", metavar="MIRROR", help="a path or a URL")
    fetch.add_argument("checkpoint", metavar="NAME@STEP", help="a run's checkpoint there, see above")
    fetch.add_argument("--output", required=True, metavar="DIR", help="gets the folder checkpoints")
    prune = command("prune", "delete old checkpoints", PRUNE_HELP, _prune)
    prune.add_argument("run_directory", metavar="RUN", type=Path, help="a run's directory")
    prune.add_argument(
        "--keep-last", type=_positive, metavar="N", help="of the newest that are whole (default: checkpoint.keep_last)"
    )
    prune.add_argument(
        "--keep-every", type=_positive, metavar="N", help="multiples of this step (default: checkpoint.keep_every)"
    )
    prune.add_argument("--dry-run", action="store_true", help="say what would go, and delete nothing")
    for name, summary, text, run in (
        ("keep", "keep checkpoints for good", KEEP_HELP, _keep),
        ("release", "undo keep", RELEASE_HELP, _release),
    ):
        added = command(name, summary, text, run)
        added.add_argument("checkpoints", metavar="RUN@STEP", nargs="+", help="checkpoints, see above")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no positive whole number")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of at least 0")
    return number


def _list(options: argparse.Namespace) -> int:
    from model.locate import step_folders, step_of
    from model.marker import COMPLETE
    from train.checkpoints.layout import is_kept

    root = _checkpoints_of(options.run_directory)
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


def _checkpoints_of(run: Path) -> Path:
    from conf import ConfigError
    from train.run_directory import RunDirectory

    root = RunDirectory(run).checkpoints
    if not root.is_dir():
        raise ConfigError([f"{run}: no run's directory, it has no folder {root.name}"])
    return root


def _time(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(path.stat().st_mtime))


def _verify(options: argparse.Namespace) -> int:
    from model.marker import read_marker
    from train.checkpoints.verification import problems_of

    if options.all:
        folders = [folder for run in options.checkpoints for folder in _all_of(Path(run))]
    else:
        folders = [located.checkpoint for located in _find(options.checkpoints) if located.checkpoint is not None]
    code = 0
    for folder in folders:
        if problems := problems_of(folder):
            code = 1
            for problem in problems:
                print(without_passwords(f"error: {problem}"), file=sys.stderr)
            print(f"{folder}: damaged")
            continue
        files = read_marker(folder).files.values()
        size = sum(int(entry["bytes"]) for entry in files)
        print(f"{folder}: whole, {len(files)} files of {size / 2**20:,.1f} MiB")
    return code


def _all_of(run: Path) -> list[Path]:
    """The checkpoints of a run. What was left of saves and deletions that were interrupted is none; it is named."""
    from conf import ConfigError
    from model.locate import step_folders
    from model.marker import is_marked

    folders = step_folders(_checkpoints_of(run))
    for folder in folders:
        if not is_marked(folder):
            print(f"{folder}: incomplete, no checkpoint")
    if not any(map(is_marked, folders)):
        raise ConfigError([f"{run} has no complete checkpoint"])
    return [folder for folder in folders if is_marked(folder)]


def _describe(options: argparse.Namespace) -> int:
    from conf import ConfigError
    from model.marker import MarkerError
    from model.weights import WeightsError
    from train.checkpoints.description import as_lines, describe
    from train.checkpoints.layout import CheckpointError

    (located,) = _find([options.checkpoint])
    try:
        description = describe(located)
    except (MarkerError, CheckpointError, WeightsError) as error:
        raise ConfigError([str(error)]) from None
    print(json.dumps(description, indent=2) if options.json else as_lines(description))
    return 0


def _consolidate(options: argparse.Namespace) -> int:
    import torch

    from conf import ConfigError
    from conf.problems import local_folder
    from data_pipeline.errors import TokenizerError
    from data_pipeline.tokenizing.tokenizer import Tokenizer
    from model.consolidation import consolidate
    from model.loading import open_stored
    from model.whole_tensors import refuse_taken
    from train.checkpoints.reader import check

    if problems := local_folder("--output", options.output):
        raise ConfigError(problems)
    (located,) = _find([options.checkpoint])
    assert located.checkpoint is not None
    output, dtype = Path(options.output), getattr(torch, options.dtype)
    try:
        refuse_taken(output)
        tokenizer = None if located.tokenizer is None else Tokenizer.load(located.tokenizer)
        if problems := check(located.checkpoint, part="weights/"):
            raise ConfigError(problems)
        stored = open_stored(located.checkpoint)
        max_bytes = int(options.file_gib * 2**30) or None
        files = consolidate(stored, output, dtype, max_bytes)
    except (ValueError, TokenizerError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError([str(error)]) from None
    if tokenizer is not None:
        tokenizer.save_to(output / "tokenizer")
    parameters = sum(math.prod(shape) for shape in stored.shapes.values())
    print(f"wrote {output}: {parameters:,} parameters in {options.dtype}, in {', '.join(files)}")
    if tokenizer is None:
        print("note: no tokenizer lies beside the checkpoint, and so none beside these weights")
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from conf import ConfigError
    from conf.problems import local_folder
    from train.checkpoints.fetching import fetch
    from train.checkpoints.mirror_store import MirrorStore

    name, at, step = options.checkpoint.rpartition("@") if "@" in options.checkpoint else (options.checkpoint, "", "")
    problems = local_folder("--output", options.output)
    if not name or bool(at) != step.isdecimal():
        problems.append(f"{options.checkpoint}: name a run, or RUN@STEP with its completed steps")
    if problems:
        raise ConfigError(problems)
    try:
        store = MirrorStore(options.mirror, name)
    except (ImportError, ValueError) as error:
        raise ConfigError([without_passwords(f"{options.mirror}: {error}")]) from None
    try:
        print(fetch(store, int(step) if at else None, Path(options.output)))
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - each file system has errors of its own
        raise OSError(f"{store.url}: {store.shown(error)}") from None
    return 0


def _prune(options: argparse.Namespace) -> int:
    from conf import ConfigError
    from train.checkpoints.pruning import delete, plan_pruning, without_its_run
    from train.run_directory import RunDirectory

    root = _checkpoints_of(options.run_directory)
    of_run = _retention_of_run(options.run_directory)
    keep_last, keep_every = options.keep_last or of_run[0], options.keep_every or of_run[1]
    if keep_last is None:
        raise ConfigError([f"--keep-last: {options.run_directory} does not say how many checkpoints stay; say it here"])
    with without_its_run(RunDirectory(options.run_directory)):
        pruning = plan_pruning(root, keep_last, keep_every)
        if not options.dry_run:
            delete(pruning.surplus)
    for folder, problem in pruning.damaged.items():
        print(without_passwords(f"{folder} is damaged and left as it is: {problem}"), file=sys.stderr)
    for folder in pruning.surplus:
        print(f"{folder} {'would be deleted' if options.dry_run else 'is deleted'}")
    if not pruning.surplus:
        print(f"{options.run_directory} has no checkpoint to delete")
    return 0


def _retention_of_run(run: Path) -> tuple[int | None, int | None]:
    """checkpoint.keep_last and keep_every of the run's last start; None where that is not known, or none."""
    from train.run_directory import RunDirectory
    from train.stored_configuration import configuration_before

    stored, _ = configuration_before(RunDirectory(run))
    section = None if stored is None else stored.get("checkpoint")

    def positive(key: str) -> int | None:
        value = section.get(key) if isinstance(section, dict) else None
        return value if type(value) is int and value > 0 else None

    return positive("keep_last"), positive("keep_every")


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
    folders = [located.checkpoint for located in _find(references, in_run=True) if located.checkpoint is not None]
    for folder in folders:
        _change(folder, change)
        print(f"{folder} {outcome.format(shlex.quote(str(folder)))}")
    return 0


def _find(references: Sequence[str], in_run: bool = False) -> list[Located]:
    """The checkpoints that `references` name; `in_run`: only one in a run's directory will do."""
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
        if located.checkpoint is None or (in_run and located.run is None):
            place = " in a run's directory" if in_run else ""
            problems.append(f"{reference} is no checkpoint{place}; name RUN@STEP")
        else:
            found.append(located)
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

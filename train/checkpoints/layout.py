"""Checkpoints that count only when they are whole, load under any layout, and never hold up the loop for a write.

A checkpoint is the folder `checkpoints/step-XXXXXXXX/`:

    weights/model.json, weights/weights-RRRRR.safetensors    fp32 weights, the part that rank R owned (model/weights.py)
    exp_avg/weights-RRRRR.safetensors, exp_avg_sq/...         AdamW's moments, in the same format
    carried/lanes-RRRRR.safetensors                           with training.carry_state: the lanes of rank R
                                                              (train/checkpoints/lanes.py)
    random-RRRRR.json                                         the random generators of rank R
    state.json                                                position, counters, callbacks, layout, identities
    complete.json                                             attempt; size and checksum of every other file
    kept.json                                                 where a user keeps it for good: nothing deletes it

Everything that is cut over ranks is stored as named parts of parameters, so another number of ranks or another stage
reads the same files. A folder without complete.json, or with a file that does not match it, is not a checkpoint; a
file that it does not list is none of the checkpoint's.

A save is staged in `checkpoints/step-XXXXXXXX.ATTEMPT.partial`, named after the start of the run that writes it, and
renamed when all is there: what a rank of an earlier start still writes never meets it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conf.named_files import unsafe_file
from conf.problems import ConfigError, is_later_format, other_format
from data_pipeline.corpus.files import hash_file, sync
from model.locate import step_folders, step_of
from model.marker import COMPLETE as MARKER
from model.marker import FORMAT_VERSION as FORMAT_VERSION
from model.marker import is_marked
from train.run_directory import CHECKPOINTS_LOCK, write_atomically

log = logging.getLogger(__name__)
STATE_JSON = "state.json"
# Names that `staging_folder` gives.
_STAGED = r"step-\d{8,}\.[0-9a-f]{12}\.partial"
KEPT = "kept.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the file and what to do."""


class LaterCheckpointError(CheckpointError):
    """A checkpoint that a later version of this program wrote."""


def refuse_other_format(file: Path, found: object, known: int = FORMAT_VERSION) -> None:
    """Raises LaterCheckpointError or CheckpointError where the format that `file` states is not `known`."""
    if problem := other_format(file, found, known):
        raise (LaterCheckpointError if is_later_format(found, known) else CheckpointError)(problem)


def generators_file(folder: Path, rank: int) -> Path:
    """The random generators of one rank."""
    return folder / f"random-{rank:05d}.json"


def describe_file(path: Path) -> dict[str, Any]:
    """What the marker says of a file."""
    found = hash_file(path, with_sha256=False)
    return {"bytes": found.bytes, "xxh3_128": found.xxh3_128}


def remove(folder: Path) -> None:
    """Delete a checkpoint, its marker first: what a crash leaves of it is then no checkpoint."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


def remove_torn(root: Path) -> list[str]:
    """Delete folders of saves that never completed, those that are staged included; returns their names.

    Rank 0 only, under the run's lock, before the first save. A link is not the run's to delete, whatever it leads to.
    """
    torn = [path for path in step_folders(root) if not is_marked(path) and not path.is_symlink()]
    torn += [path for path in sorted(root.glob("step-*.partial")) if re.fullmatch(_STAGED, path.name)]
    for path in torn:
        # A rank of an earlier start may be writing there. What remains is deleted by the next start.
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in torn]


def remove_after(root: Path, step: int) -> list[str]:
    """Take checkpoints of later steps than `step` out of the run; returns their names. Rank 0 only, while nothing is
    written. One that stays for good is called set-aside-step-XXXXXXXX from then on."""
    later = [path for path in step_folders(root) if step_of(path) > step]
    with deciding_what_stays(root):
        for path in reversed(later):
            if stays(path):
                _set_aside(path)
            else:
                remove(path)
    return [path.name for path in later]


def _set_aside(folder: Path) -> None:
    name, number = f"set-aside-{folder.name}", 1
    while os.path.lexists(folder.with_name(name)):
        number += 1
        name = f"set-aside-{number}-{folder.name}"
    folder.rename(folder.with_name(name))


def begin_staging(folder: Path, attempt: str, parts: tuple[str, ...]) -> Path:
    """Make the empty folder in which `attempt` writes the checkpoint `folder`, with its folders `parts`; returns it."""
    staged = staging_folder(folder, attempt)
    shutil.rmtree(staged, ignore_errors=True)
    for name in parts:
        (staged / name).mkdir(parents=True)
    return staged


def staging_folder(folder: Path, attempt: str) -> Path:
    """Where the checkpoint `folder` lies while `attempt` writes it."""
    return folder.with_name(f"{folder.name}.{attempt}.partial")


def mark_complete(staged: Path, attempt: str, files: Mapping[str, Any]) -> None:
    """Write the marker; `files`: path in the checkpoint -> `describe_file`."""
    marker = {"format_version": FORMAT_VERSION, "attempt": attempt, "files": files}
    write_atomically(staged / MARKER, json.dumps(marker, indent=1))


def put_in_place(staged: Path, folder: Path) -> None:
    """Make the complete `staged` the checkpoint `folder`. What an earlier try left there goes, but for its being kept;
    a link there is set aside, as is what is no folder."""
    with deciding_what_stays(folder.parent):
        if folder.is_symlink() or folder.is_file():
            _set_aside(folder)
        elif folder.exists():
            try:
                if is_kept(folder):
                    # Not what a link of that name leads to.
                    shutil.copyfile(folder / KEPT, staged / KEPT, follow_symlinks=False)
                remove(folder)
            except OSError as error:
                _set_aside(folder)
                log.warning("%s cannot be deleted (%s) and is set aside", folder, error)
        staged.rename(folder)
    sync(folder.parent)


@contextlib.contextmanager
def deciding_what_stays(root: Path) -> Iterator[None]:
    """While a checkpoint under `root` is deleted or kept: no other process does either. Raises ConfigError where the
    lock's file is no file of the run's."""
    if problem := unsafe_file(root.parent, "a file", CHECKPOINTS_LOCK, root.parent):
        raise ConfigError([problem])
    with (root.parent / CHECKPOINTS_LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stays(folder: Path) -> bool:
    """Whether nothing deletes the checkpoint: a user keeps it for good, or has moved it elsewhere and left a link.

    Neither the link goes nor what it leads to: that is the user's, may be shared by several runs, and takes no room on
    this disk, which is all that pruning is for.
    """
    return folder.is_symlink() or is_kept(folder)


def is_kept(folder: Path) -> bool:
    """Whether a user keeps the checkpoint for good, for all that can be seen."""
    try:
        (folder / KEPT).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def keep(folder: Path) -> None:
    """Let nothing delete the checkpoint. Call it while `deciding_what_stays`."""
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_atomically(folder / KEPT, json.dumps({"format_version": FORMAT_VERSION, "since": since}) + "\n")


def release(folder: Path) -> None:
    """Undo `keep`."""
    (folder / KEPT).unlink(missing_ok=True)

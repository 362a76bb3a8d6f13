"""Deletes checkpoints of a run by hand, for `python -m train.checkpoint prune`."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from conf.problems import ConfigError
from model.locate import complete_checkpoints, step_of
from train.callbacks.bad_steps import goes_back_to
from train.callbacks.checkpointing import steps_that_stay
from train.checkpoints.layout import CheckpointError, deciding_what_stays, remove, stays
from train.checkpoints.reader import faults
from train.checkpoints.retention import Retention
from train.checkpoints.state import read_state
from train.run_directory import RunDirectory


@dataclass
class Pruning:
    """What is to become of the checkpoints of a run."""

    surplus: list[Path] = field(default_factory=list)
    # Newer than the newest that are whole, and what is wrong with each; they are left as they are.
    damaged: dict[Path, str] = field(default_factory=dict)


@contextlib.contextmanager
def without_its_run(directory: RunDirectory) -> Iterator[None]:
    """While the run is not under way, which reads and deletes checkpoints itself. Raises ConfigError where it is."""
    if not directory.lock.is_file():
        yield
        return
    with directory.lock.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                [
                    f"{directory.path} is in use by {file.read().strip() or 'another process'}; a run deletes its old "
                    "checkpoints itself (checkpoint.keep_last): prune when it has ended"
                ]
            ) from None
        yield


def plan_pruning(root: Path, keep_last: int, keep_every: int | None) -> Pruning:
    """What is to be deleted under `root`, so that `keep_last` whole checkpoints stay, and others as `Retention` says.

    Reads the newest checkpoints until so many are whole. Raises ConfigError where none is, and nothing may go.
    """
    complete = complete_checkpoints(root)
    pruning, whole, rest = Pruning(), list[Path](), list(complete)
    while rest and len(whole) < keep_last:
        folder = rest.pop()
        if found := faults(folder):
            pruning.damaged[folder] = found[0].problem
        else:
            whole.insert(0, folder)
    if not whole:
        told = [f"{folder.name}: {problem}" for folder, problem in pruning.damaged.items()]
        raise ConfigError([f"{root} has no checkpoint that is whole, so nothing may be deleted", *told])
    retention = _retention(whole[-1], keep_last, keep_every)
    folders = {step_of(folder): folder for folder in [*rest, *whole]}
    surplus = [folders[step] for step in retention.surplus(sorted(folders))]
    pruning.surplus = [folder for folder in surplus if not stays(folder)]
    return pruning


def delete(folders: list[Path]) -> None:
    """Delete checkpoints of one run."""
    for folder in folders:
        with deciding_what_stays(folder.parent):
            # A user may keep it since it was planned.
            if not stays(folder):
                remove(folder)


def _retention(newest: Path, keep_last: int, keep_every: int | None) -> Retention:
    """Beside what was asked for, what the run itself would not delete by the state in its newest checkpoint."""
    try:
        callbacks = read_state(newest).callbacks
        return Retention(keep_last, keep_every, steps_that_stay(callbacks), goes_back_to(callbacks))
    except CheckpointError as error:
        raise ConfigError([str(error)]) from None
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(
            [f"{newest}: its state does not say which checkpoints must stay ({type(error).__name__}: {error})"]
        ) from None

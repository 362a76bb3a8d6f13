"""Takes a checkpoint from the mirror that is newer than the run's own, when a run starts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.corpus.files import sync
from model.locate import step_folder
from model.marker import LaterMarkerError, MarkerError, read_marker
from train.checkpoints.fetching import download_files
from train.checkpoints.layout import MARKER, LaterCheckpointError, begin_staging, put_in_place, staging_folder
from train.checkpoints.mirror import VoidNote
from train.checkpoints.mirror_store import MirrorStore
from train.errors import RunError
from train.parallel.mesh import Mesh
from train.run_directory import Attempt, RunDirectory


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was taken from the mirror."""

    folder: Path
    step: int
    seconds: float


class Restorer:
    """Of one start of a run, on every rank: the ranks share the copying, each takes other files."""

    def __init__(self, store: MirrorStore, directory: RunDirectory, attempt: Attempt, mesh: Mesh):
        self._store, self._directory, self._attempt, self._mesh = store, directory, attempt, mesh

    def newer_steps(self, own: int | None) -> tuple[list[int], str]:
        """Steps of checkpoints at the mirror that are newer than `own`, the newest first; and why that is not known.
        Collective."""
        found: tuple[list[int], str] = [], ""
        if self._mesh.is_main:
            try:
                VoidNote(self._directory.mirror_void).apply(self._store)
                steps = [step for step, is_marked in self._store.steps().items() if is_marked]
                found = [step for step in reversed(steps) if own is None or step > own], ""
            except Exception as error:  # noqa: BLE001 - each file system has errors of its own
                found = [], self._store.shown(error)
        return self._mesh.broadcast_object(found, group="world")

    def restore(self, steps: list[int], on_rejected: Callable[[int, str], None]) -> Restored | None:
        """Make the first of `steps` that is whole at the mirror a checkpoint of the run; None where none is.

        Collective. Raises LaterCheckpointError for one that a later version of this program wrote.
        """
        for step in steps:
            started = time.monotonic()
            folder = step_folder(self._directory.checkpoints, step)
            problem = self._fetch(folder, step)
            if not problem:
                return Restored(folder, step, time.monotonic() - started)
            on_rejected(step, problem)
        return None

    def _fetch(self, folder: Path, step: int) -> str:
        """Copy one checkpoint, verified, and put it in place; returns what is wrong with it."""
        staged = staging_folder(folder, self._attempt.identity)
        problem, is_later = "", False
        if self._mesh.is_main:
            try:
                begin_staging(folder, self._attempt.identity, ("weights",))
                self._store.download(step, MARKER, staged / MARKER)
                read_marker(staged)
            except LaterMarkerError as error:
                problem, is_later = str(error), True
            except Exception as error:  # noqa: BLE001 - each file system has errors of its own
                problem = self._shown(error)
        problem, is_later = self._mesh.broadcast_object((problem, is_later), group="world")
        if is_later:
            raise LaterCheckpointError(problem)
        problems = self._mesh.gather_objects("" if problem else self._fetch_share(staged, step), group="world")
        problem = next(filter(None, [problem, *problems]), "")
        if self._mesh.is_main:
            if problem:
                shutil.rmtree(staged, ignore_errors=True)
            else:
                for path in (*(path for path in staged.rglob("*") if path.is_dir()), staged):
                    sync(path)
                self._attempt.check()
                put_in_place(staged, folder)
        self._mesh.barrier(group="world")
        return problem

    def _fetch_share(self, staged: Path, step: int) -> str:
        """Copy this rank's files; returns what is wrong with the first that is not as the marker says."""
        try:
            names = sorted(read_marker(staged).files)
            download_files(self._store, step, staged, names[self._mesh.rank :: self._mesh.size])
        except Exception as error:  # noqa: BLE001 - each file system has errors of its own
            return self._shown(error)
        return ""

    def _shown(self, error: Exception) -> str:
        return str(error) if isinstance(error, MarkerError) else self._store.shown(error)


def refuse_unknown(store: MirrorStore, problem: str) -> RunError:
    """For a run without a checkpoint of its own, which would begin anew though the mirror may have some."""
    return RunError(
        f"checkpoint.mirror: {store.url} cannot be read ({problem}), so whether the run has checkpoints there is not "
        "known, and there is none in its folder. Try again, or set checkpoint.mirror=null to begin without"
    )

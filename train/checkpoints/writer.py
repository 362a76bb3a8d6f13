"""Saving in the background: `save` returns when the state is copied to host memory."""

from __future__ import annotations

import copy
import errno
import json
import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_pipeline.corpus.files import sync
from model.accounting import parameter_shapes
from model.config import ModelConfig
from model.locate import complete_checkpoints, step_folder, step_folders, step_of
from model.marker import is_marked
from model.weights import save_fragments, write_model_json
from train.checkpoints.generators import generator_states
from train.checkpoints.host_memory import HostMemory
from train.checkpoints.lanes import FOLDER as CARRIED
from train.checkpoints.lanes import save_lanes
from train.checkpoints.layout import (
    CheckpointError,
    begin_staging,
    deciding_what_stays,
    describe_file,
    generators_file,
    mark_complete,
    put_in_place,
    remove,
    remove_after,
    staging_folder,
    stays,
)
from train.checkpoints.mirror import Mirror
from train.checkpoints.retention import Retention
from train.checkpoints.state import TrainState, write_state
from train.config import CheckpointConfig
from train.errors import RunError
from train.parallel.engine import Engine
from train.parallel.fragments import MOMENTS
from train.parallel.mesh import Mesh
from train.run_directory import Attempt

_COMMIT_TIMEOUT_SECONDS = 3600.0
# By which it is judged how long the next one takes.
REMEMBERED_SAVES = 8
# Between looks at whether all ranks are done.
_POLL_SECONDS = 0.02
OnComplete = Callable[[Path, float, float], None]
log = logging.getLogger(__name__)


class CheckpointWriter:
    """Saves in the background: `save` returns when the state is copied to host memory."""

    def __init__(
        self,
        root: Path,
        mesh: Mesh,
        model: ModelConfig,
        config: CheckpointConfig,
        resumed_step: int | None,
        attempt: Attempt,
        mirror: Mirror | None = None,
    ):
        """`resumed_step`: the step whose checkpoint the run goes on from; None when it starts. `attempt`: the start of
        the run that this rank belongs to; once there is another, nothing is written any more. `mirror`: gets a copy of
        every checkpoint, on rank 0."""
        self.mirror = mirror
        self.attempt = attempt
        self.root = root
        self.mesh = mesh
        self.model = model
        self.rank = mesh.rank
        self.keep_last = config.keep_last
        self.keep_every = config.keep_every
        # Steps whose checkpoints are kept beyond that.
        self.staying: frozenset[int] = frozenset()
        # The step whose checkpoint is on disk already, or on its way.
        self._last_step = resumed_step
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        # Where the save under way is staged, and how large this rank's part of it is.
        self._staged: Path | None = None
        self._bytes = 0
        # Set where another rank's part has failed.
        self._is_given_up = threading.Event()
        # The newest checkpoint of this step or before stays, whatever `keep_last` says: the run may go back to it.
        self.kept_for_going_back: int | None = None
        # Saves in a row that have failed on some rank; equal on all ranks.
        self.failed_saves = 0
        # On rank 0, seconds that the latest saves of this start took in all.
        self.seconds = deque[float](maxlen=REMEMBERED_SAVES)
        self._began = 0.0
        self._memory = HostMemory(mesh.device)

    def prepare(self, engine: Engine) -> None:
        """Let the first save hold the loop no longer than the others. Once, before any save."""
        self._memory.prepare([tensor.nbytes for tensor in _saved_tensors(engine)])

    @property
    def last_step(self) -> int | None:
        """The step whose checkpoint is on disk already, or on its way."""
        return self._last_step

    @property
    def seconds_under_way(self) -> float | None:
        """Since the save under way began; None where this rank is writing nothing. Rank 0 writes until all is whole."""
        is_under_way = self._thread is not None and self._thread.is_alive()
        return time.monotonic() - self._began if is_under_way else None

    @property
    def has_failed(self) -> bool:
        """Whether this rank's part of the save under way has failed."""
        return self._error is not None

    def save(self, engine: Engine, state: TrainState, on_complete: OnComplete) -> Path:
        """Copy this rank's part to host memory and start writing it. Collective: every rank calls it at the same step.

        `on_complete(folder, seconds, held_seconds)` runs on rank 0's writing thread once the checkpoint counts: what
        writing took in the background, and what this call took. The previous save has been settled. Raises RunError
        when another start has taken over the run.
        """
        assert self._thread is None and self._error is None, "the previous save is not settled"
        folder = step_folder(self.root, state.step)
        # Not "has the marker": rank 0 sees that earlier than the others, and they must all agree.
        if state.step == self._last_step:
            return folder
        self._last_step = state.step
        self._began = time.monotonic()
        snapshot = _Snapshot.take(engine, state, self.model, self._memory)
        self._staged, self._bytes = staging_folder(folder, self.attempt.identity), snapshot.nbytes
        self.attempt.check()
        if self.rank == 0:
            try:
                begin_staging(
                    folder, self.attempt.identity, ("weights", *MOMENTS, *((CARRIED,) if snapshot.carried else ()))
                )
            except OSError as error:
                self._error = error
        if not all(self.mesh.gather_objects(self._error is None, group="world")):
            return folder
        arguments = (folder, snapshot, on_complete, time.monotonic() - self._began)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint-writer")
        self._thread.start()
        return folder

    def settle(self) -> dict[int, str]:
        """Wait until the save under way is whole on the disk, or has failed: rank -> why. Collective.

        What failed is given up by all ranks, and its room on the disk is free again. Raises RunError as `save` does.
        """
        if self._staged is None:
            return {}
        while True:
            if isinstance(self._error, RunError):
                raise self._error
            is_done = self._thread is None or not self._thread.is_alive()
            of_ranks = self.mesh.gather_objects((is_done, self._problem()), group="world")
            problems = {rank: problem for rank, (_, problem) in enumerate(of_ranks) if problem}
            if problems:
                self._give_up()
                self.failed_saves += 1
                return problems
            if all(is_done for is_done, _ in of_ranks):
                self.wait()
                self._staged = None
                self.failed_saves = 0
                return {}
            time.sleep(_POLL_SECONDS)

    def _problem(self) -> str:
        error = self._error
        if error is None:
            return ""
        text = f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error) or repr(error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
            free = shutil.disk_usage(self.root).free
            text += f" (this rank's part needs {self._bytes / 2**30:.3f} GiB, {free / 2**30:.3f} are free)"
        return text

    def _give_up(self) -> None:
        self._is_given_up.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.mesh.barrier(group="world")
        self._is_given_up.clear()
        if self.rank == 0 and self._staged is not None:
            shutil.rmtree(self._staged, ignore_errors=True)
        self._error = self._staged = self._last_step = None

    def abandon(self) -> None:
        """The process ends before the save under way does: nobody waits for it, and where it is not whole by itself
        it never counts."""
        self._is_given_up.set()

    def wait(self) -> None:
        """Until this rank's part of the save under way has ended (on rank 0, all of it). Raises CheckpointError if it
        failed, RunError as `save` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, RunError):
                raise error
            raise CheckpointError(
                f"writing the checkpoint under {self.root} failed on rank {self.rank}: {error}. Earlier checkpoints "
                "are untouched; make room or repair the disk and start the same command again"
            ) from error

    def rewind(self, step: int) -> None:
        """Go on from the checkpoint of `step`, or from the beginning if that is 0: later ones are deleted, so that no
        start takes up what was given up. Collective; the previous save has been settled."""
        self.mesh.barrier(group="world")
        if self.rank == 0:
            if self.mirror is not None:
                self.mirror.rewind(step)
            remove_after(self.root, step)
        self._last_step = step or None

    def settle_mirror(self, seconds: float) -> str | None:
        """Wait so long until the mirror has what was saved; returns what went wrong there. What stayed on the disk only
        to be copied goes. On rank 0, while no save is under way."""
        if self.mirror is None:
            return None
        problem = self.mirror.settle(seconds)
        if self._last_step is not None:
            self._prune(step_folder(self.root, self._last_step))
        return problem

    def mirror_again(self) -> None:
        """Let the mirror have the checkpoint that the run goes on from: an earlier start may have ended before."""
        if self.mirror is not None and self._last_step is not None:
            self.mirror.request(self._last_step, self.retention)

    def _write(self, folder: Path, snapshot: _Snapshot, on_complete: OnComplete, held: float) -> None:
        started = time.monotonic()
        try:
            staged = staging_folder(folder, self.attempt.identity)
            self.attempt.check()
            files = snapshot.write(staged, self.rank)
            report = {
                "attempt": self.attempt.identity,
                "files": {str(path.relative_to(staged)): describe_file(path) for path in files},
            }
            # Renamed as the last thing that is done there: rank 0 may then rename the folder at any time.
            written = staged / f"rank-{self.rank:05d}.json.partial"
            written.write_text(json.dumps(report), encoding="utf-8")
            written.rename(written.with_suffix(""))
            if self.rank == 0:
                self._commit(staged, folder)
                self.seconds.append(time.monotonic() - self._began)
                on_complete(folder, time.monotonic() - started, held)
                if self.mirror is not None:
                    self.mirror.request(step_of(folder), self.retention)
                self._prune(folder)
        except BaseException as error:  # noqa: BLE001 - handed to the training thread by wait()
            self._error = error

    def _commit(self, staged: Path, folder: Path) -> None:
        """Write the marker once every rank has reported its files. Ranks meet on the file system: a collective on this
        thread could overtake one of the training thread."""
        reports = [staged / f"rank-{rank:05d}.json" for rank in range(self.mesh.size)]
        deadline = time.monotonic() + _COMMIT_TIMEOUT_SECONDS
        while not all(report.exists() for report in reports):
            if self._is_given_up.is_set():
                raise CheckpointError("another rank's part failed")
            if time.monotonic() > deadline:
                missing = [report.name for report in reports if not report.exists()]
                raise CheckpointError(f"{staged}: no word from {', '.join(missing)} within {_COMMIT_TIMEOUT_SECONDS} s")
            time.sleep(_POLL_SECONDS)
        files: dict[str, Any] = {}
        for report in reports:
            found = json.loads(report.read_text(encoding="utf-8"))
            if found["attempt"] != self.attempt.identity:
                raise CheckpointError(f"{report} is of attempt {found['attempt']}, not of {self.attempt.identity}")
            files |= found["files"]
            report.unlink()
        _sync_folders(staged)
        mark_complete(staged, self.attempt.identity, files)
        # The last look: from here on the folder has the name of a checkpoint.
        self.attempt.check()
        put_in_place(staged, folder)

    @property
    def retention(self) -> Retention:
        """Which checkpoints are not deleted to make room."""
        return Retention(self.keep_last, self.keep_every, self.staying, self.kept_for_going_back)

    def _prune(self, newest: Path) -> None:
        # A later one was damaged and passed over by the resume: it takes no place among those that are kept.
        steps = [step_of(path) for path in complete_checkpoints(self.root) if step_of(path) <= step_of(newest)]
        in_use = frozenset[int]() if self.mirror is None else self.mirror.steps_in_use
        surplus = set(self.retention.surplus(steps)) - in_use
        # What is left of one whose deletion failed goes too.
        old = [
            path
            for path in step_folders(self.root)
            if step_of(path) < step_of(newest) and (not is_marked(path) or step_of(path) in surplus)
        ]
        with deciding_what_stays(self.root):
            for folder in old:
                if not stays(folder):
                    try:
                        remove(folder)
                    except OSError as error:
                        # What cannot be deleted is no reason to end a run whose new checkpoint is safe.
                        log.warning("%s cannot be deleted: %s", folder, error)


@dataclass
class _Snapshot:
    """Host copies of one rank's part."""

    model: ModelConfig
    tensors: dict[str, list[tuple[str, int, torch.Tensor]]]
    state: TrainState
    generators: dict[str, Any]
    # What the lanes of this rank carry, beginning with the lane of this number.
    first_lane: int = 0
    carried: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        parts = (tensor for fragments in self.tensors.values() for _, _, tensor in fragments)
        return sum(tensor.nbytes for tensor in (*parts, *self.carried.values()))

    @classmethod
    def take(cls, engine: Engine, state: TrainState, model: ModelConfig, memory: HostMemory) -> _Snapshot:
        """Copies in `memory`; those of the snapshot before end."""
        memory.clear()
        owned = [fragment for fragment in engine.fragments if fragment.owned]
        device = engine.mesh.device
        tensors = {"weights": [(f.name, f.offset, memory.copy(f.master)) for f in owned]}
        for key in MOMENTS:
            tensors[key] = [(f.name, f.offset, memory.copy(f.moment(key))) for f in owned]
        snapshot = cls(model, tensors, copy.deepcopy(state), generator_states(device))
        if engine.carried is not None:
            snapshot.first_lane = engine.carried.lanes.start
            carried = engine.carried.tensors()
            snapshot.carried = {name: memory.copy(tensor).view(tensor.shape) for name, tensor in carried.items()}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return snapshot

    def write(self, folder: Path, rank: int) -> list[Path]:
        """Write rank `rank`'s files; returns their paths."""
        files = []
        shapes = parameter_shapes(self.model)
        for name, fragments in self.tensors.items():
            if fragments:
                path = folder / name / f"weights-{rank:05d}.safetensors"
                save_fragments(path, fragments, shapes)
                files.append(path)
        if self.carried:
            files.append(save_lanes(folder, rank, self.first_lane, self.carried))
        generators = generators_file(folder, rank)
        generators.write_text(json.dumps(self.generators), encoding="utf-8")
        files.append(generators)
        if rank == 0:
            files.append(write_model_json(folder / "weights", self.model))
            files.append(write_state(folder, self.state))
        for path in files:
            sync(path)
        return files


def _saved_tensors(engine: Engine) -> list[torch.Tensor]:
    """What this rank's part of a checkpoint is made of."""
    owned = [fragment for fragment in engine.fragments if fragment.owned]
    moments = [fragment.moment(key) for key in MOMENTS for fragment in owned]
    carried = [] if engine.carried is None else list(engine.carried.tensors().values())
    return [*(fragment.master for fragment in owned), *moments, *carried]


def _sync_folders(folder: Path) -> None:
    parts = [folder / name for name in ("weights", *MOMENTS, CARRIED)]
    for path in (*(part for part in parts if part.exists()), folder, folder.parent):
        sync(path)

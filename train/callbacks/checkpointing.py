"""When checkpoints are written: at an interval, when the run is asked to stop, and at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.locate import complete_checkpoints
from train.callbacks.base import Callback
from train.checkpoints.layout import CheckpointError
from train.checkpoints.writer import REMEMBERED_SAVES
from train.decisions import CONTINUE, Decision, Rollback
from train.errors import RunError
from train.length import last_phase_begins_now

if TYPE_CHECKING:
    from train.evaluate import EvaluationResult
    from train.trainer import Trainer


class Checkpointing(Callback):
    """Must be the last callback: what the others did at a step is then part of that step's checkpoint.

    At the end of the run, where the last comes first, the checkpoint is on disk before W&B uploads anything and before
    another signal may kill the process.
    """

    def __init__(self) -> None:
        # The step after which a checkpoint is written whatever the interval says.
        self._due: int | None = None
        # Of the set that checkpoint.keep_best names, (step, loss): scored last, and the best that has a checkpoint.
        self._scored: tuple[int, float] | None = None
        self._best: tuple[int, float] | None = None
        # Steps of checkpoints before the last phase of the schedule (of several, where the run was made longer), and of
        # those that checkpoint.keep_at names.
        self._before_decay: list[int] = []
        # Seconds that the latest saves of earlier starts took, and with those of this start.
        self._seconds_before: list[float] = []
        self._seconds: list[float] = []

    def on_run_start(self, trainer: Trainer) -> None:
        trainer.saves.staying = _staying(self.state_dict())
        trainer.saves.mirror_again()
        if trainer.config.checkpoint.interval:
            trainer.saves.prepare(trainer.engine)

    def on_step_end(self, trainer: Trainer) -> Decision:
        interval = trainer.config.checkpoint.interval
        if trainer.config.checkpoint.keep_before_decay and last_phase_begins_now(trainer.config, trainer.state):
            self._before_decay.append(trainer.step)
            self._due = trainer.step
        if trainer.step in trainer.config.checkpoint.keep_at:
            self._before_decay.append(trainer.step)
            self._due = trainer.step
        if (self._due is not None and trainer.step >= self._due) or (interval and trainer.step % interval == 0):
            self._due = None
            self._save(trainer)
        return CONTINUE

    def on_evaluation(self, trainer: Trainer, results: dict[str, EvaluationResult]) -> Decision:
        name = trainer.config.checkpoint.keep_best
        if name is not None and name in results:
            self._scored = (trainer.step, results[name].loss)
        return CONTINUE

    def _save(self, trainer: Trainer) -> None:
        if self._scored is not None and self._scored[0] == trainer.step:
            self._best = self._scored if self._best is None else min(self._best, self._scored, key=lambda one: one[1])
        # How long the one before took is known then.
        trainer.settle_save()
        self._seconds = [*self._seconds_before, *trainer.saves.seconds][-REMEMBERED_SAVES:]
        trainer.save_checkpoint(_staying(self.state_dict()))

    def on_save_failed(self, trainer: Trainer, problems: dict[int, str]) -> None:
        """Try again, after twice as many steps each time. Raises RunError when that was often enough."""
        failures, limit = trainer.saves.failed_saves, trainer.config.checkpoint.max_failed_saves
        self._due = trainer.step + 2 ** (failures - 1)
        for rank, problem in problems.items():
            trainer.events.append("save_failed", step=trainer.step, rank=rank, failures=failures, problem=problem)
        told = "; ".join(f"rank {rank}: {problem}" for rank, problem in problems.items())
        trainer.context.warn(f"a checkpoint could not be written ({told}). Older checkpoints are untouched")
        if failures > limit:
            raise RunError(
                f"{failures} checkpoints in a row could not be written, more than checkpoint.max_failed_saves={limit} "
                f"({told}). Make room under {trainer.run_directory} or repair its disk, and start the same command "
                "again: it resumes from the last checkpoint that is whole"
            )

    def on_mirror_failed(self, trainer: Trainer, problem: str) -> None:
        trainer.context.report_mirror_failed(trainer.step, problem)

    def on_rollback(self, trainer: Trainer, rollback: Rollback, left: int) -> None:
        # The checkpoint that the run went back to knows nothing of the samples that are left out now.
        self._due = trainer.step + 1

    def on_run_end(self, trainer: Trainer, outcome: str) -> None:
        if outcome != "failed":
            left = _seconds_left(trainer)
            missing = None if left is None or outcome == "complete" else self._missing_time(trainer, left)
            if missing is not None:
                self._leave_out(trainer, missing)
                return
            self._save(trainer)
            if trainer.settle_save():
                self._save(trainer)
                if problems := trainer.settle_save():
                    raise CheckpointError(
                        f"the last checkpoint, of step {trainer.step}, could not be written: "
                        f"{'; '.join(problems.values())}. Make room under {trainer.run_directory} or repair its disk, "
                        "and start the same command again"
                    )
            self._settle_mirror(trainer)
            return
        try:
            # What is being written holds an earlier step and needs no other rank's training thread.
            trainer.await_own_save()
        except (CheckpointError, RunError) as error:
            # Raised, it would stand in the place of what the run failed of.
            failures = trainer.saves.failed_saves + 1
            trainer.events.append(
                "save_failed", step=trainer.step, rank=trainer.mesh.rank, failures=failures, problem=str(error)
            )

    def _settle_mirror(self, trainer: Trainer) -> None:
        """Wait for the last copy, as long as there is time."""
        if trainer.context.mirror_store is not None:
            left, seconds = _seconds_left(trainer), trainer.config.checkpoint.mirror_seconds
            trainer.settle_mirror(seconds if left is None else min(seconds, left))

    def _missing_time(self, trainer: Trainer, left: float) -> _MissingTime | None:
        """Why the last checkpoint would not be written in the seconds that are `left`; None where it would, for all
        that is known. Equal on all ranks."""
        saves = trainer.saves
        each = max([*self._seconds_before, *saves.seconds], default=0.0)
        since = saves.seconds_under_way
        under_way = 0.0 if since is None else max(0.0, each - since)
        # Of rank 0, which writes until all is whole.
        each, under_way = trainer.mesh.broadcast_object((each, under_way), group="world")
        needed = under_way + (0.0 if saves.last_step == trainer.step else each)
        return None if needed <= left else _MissingTime(left, needed, under_way)

    def _leave_out(self, trainer: Trainer, missing: _MissingTime) -> None:
        """End without the last checkpoint. One that is under way is waited for where its end is near enough."""
        if missing.under_way <= missing.left:
            trainer.settle_save()
            self._settle_mirror(trainer)
        else:
            trainer.saves.abandon()
        left, needed = round(missing.left, 1), round(missing.needed, 1)
        trainer.events.append("save_skipped", step=trainer.step, seconds_left=left, seconds_needed=needed)
        complete = complete_checkpoints(trainer.context.directory.checkpoints)
        goes_on = f"from {complete[-1].name}" if complete else "from its beginning"
        trainer.context.warn(
            f"step {trainer.step} is not saved: {max(0.0, left):g} s are left (preemption.seconds_left, or the time of "
            f"the job), and to save took up to {needed:g} s. The run goes on {goes_on}"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "before_decay": self._before_decay, "seconds": self._seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        best = state.get("best")
        self._best = None if best is None else (best[0], best[1])
        self._before_decay = list(state.get("before_decay", []))
        self._seconds_before = list(state.get("seconds", []))
        self._scored = None


def _seconds_left(trainer: Trainer) -> float | None:
    """Until the first process of the run is killed; None: not known. Collective, equal on all ranks."""
    of_ranks = trainer.mesh.gather_objects(trainer.deadline.left(), group="world")
    return min((seconds for seconds in of_ranks if seconds is not None), default=None)


@dataclass(frozen=True)
class _MissingTime:
    """Seconds until the process is killed; that saving takes until all is on disk; that the save under way takes."""

    left: float
    needed: float
    under_way: float


def steps_that_stay(callbacks: Mapping[str, Mapping[str, Any]]) -> frozenset[int]:
    """The steps whose checkpoints are not deleted to make room, by the states of a checkpoint's callbacks."""
    return _staying(callbacks.get(Checkpointing.__name__, {}))


def _staying(state: Mapping[str, Any]) -> frozenset[int]:
    best = state.get("best")
    return frozenset([*state.get("before_decay", []), *([] if best is None else best[:1])])

"""When checkpoints are written: at an interval, when the run is asked to stop, and at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from train.callbacks.base import Callback
from train.checkpoints.layout import CheckpointError
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
        best = [] if self._best is None else [self._best[0]]
        trainer.save_checkpoint(frozenset([*self._before_decay, *best]))

    def on_save_failed(self, trainer: Trainer, problems: dict[int, str]) -> None:
        """Try again, after twice as many steps each time. Raises RunError when that was often enough."""
        failures, limit = trainer.failed_saves, trainer.config.checkpoint.max_failed_saves
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

    def on_rollback(self, trainer: Trainer, rollback: Rollback, left: int) -> None:
        # The checkpoint that the run went back to knows nothing of the samples that are left out now.
        self._due = trainer.step + 1

    def on_run_end(self, trainer: Trainer, outcome: str) -> None:
        if outcome != "failed":
            self._save(trainer)
            if trainer.settle_save():
                self._save(trainer)
                if problems := trainer.settle_save():
                    raise CheckpointError(
                        f"the last checkpoint, of step {trainer.step}, could not be written: "
                        f"{'; '.join(problems.values())}. Make room under {trainer.run_directory} or repair its disk, "
                        "and start the same command again"
                    )
            return
        try:
            # What is being written holds an earlier step and needs no other rank's training thread.
            trainer.await_own_save()
        except (CheckpointError, RunError) as error:
            # Raised, it would stand in the place of what the run failed of.
            failures = trainer.failed_saves + 1
            trainer.events.append(
                "save_failed", step=trainer.step, rank=trainer.mesh.rank, failures=failures, problem=str(error)
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "before_decay": self._before_decay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        best = state.get("best")
        self._best = None if best is None else (best[0], best[1])
        self._before_decay = list(state.get("before_decay", []))
        self._scored = None

"""When checkpoints are written: at an interval, when the run is asked to stop, and at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from train.callbacks.base import Callback
from train.checkpoints.layout import CheckpointError
from train.decisions import CONTINUE, Decision, Rollback
from train.errors import RunError

if TYPE_CHECKING:
    from train.trainer import Trainer


class Checkpointing(Callback):
    """Must be the last callback: what the others did at a step is then part of that step's checkpoint.

    At the end of the run, where the last comes first, the checkpoint is on disk before W&B uploads anything and before
    another signal may kill the process.
    """

    def __init__(self) -> None:
        self._save_next = False

    def on_step_end(self, trainer: Trainer) -> Decision:
        interval = trainer.config.checkpoint.interval
        if self._save_next or (interval and trainer.step % interval == 0):
            trainer.save_checkpoint()
            self._save_next = False
        return CONTINUE

    def on_rollback(self, trainer: Trainer, rollback: Rollback, left: int) -> None:
        # The checkpoint that the run went back to knows nothing of the samples that are left out now.
        self._save_next = True

    def on_run_end(self, trainer: Trainer, outcome: str) -> None:
        if outcome != "failed":
            trainer.save_checkpoint()
            trainer.finish_saving()
            return
        try:
            # What is being written holds an earlier step and needs no other rank's training thread.
            trainer.finish_saving()
        except (CheckpointError, RunError) as error:
            # Raised, it would stand in the place of what the run failed of.
            trainer.events.append("error", message=str(error))

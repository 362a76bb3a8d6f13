"""When checkpoints are written: at an interval, when the run is asked to stop, and at its end."""

from __future__ import annotations

from train.callbacks.base import Callback
from train.checkpoints.writer import CheckpointError


class Checkpointing(Callback):
    """Must be the last callback: what the others did at a step is then part of that step's checkpoint.

    At the end of the run, where the last comes first, the checkpoint is on disk before W&B uploads anything and before
    another signal may kill the process.
    """

    def on_step_end(self, trainer) -> None:
        interval = trainer.config.checkpoint.interval
        if interval and trainer.step % interval == 0:
            trainer.save_checkpoint()

    def on_run_end(self, trainer, outcome: str) -> None:
        if outcome != "failed":
            trainer.save_checkpoint()
            trainer.finish_saving()
            return
        try:
            # What is being written holds an earlier step and needs no other rank's training thread.
            trainer.finish_saving()
        except CheckpointError as error:
            # Raised, it would stand in the place of what the run failed of.
            trainer.events.append("error", message=str(error))

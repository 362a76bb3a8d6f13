"""The hooks that a run offers. Every concern beside the training step itself is a callback, one file each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from train.decisions import CONTINUE, Decision, Rollback

if TYPE_CHECKING:
    from train.callbacks.alerts import Alert
    from train.callbacks.samples import Sample
    from train.evaluate import EvaluationResult
    from train.trainer import Trainer


class Callback:
    """All hooks do nothing by default. They run on every rank, in the trainer's order (on_run_end: reversed).

    A hook that returns a `Decision` may stop the run or take it back. What it decides on one rank is known to all at
    the end of the next step, and followed by all there; CONTINUE decides nothing.
    `state_dict` is saved in each checkpoint (rank 0's copy, JSON values only) and given back on resume and rollback.
    """

    def on_run_start(self, trainer: Trainer) -> None:
        """After resuming, before the first step."""

    def on_step_start(self, trainer: Trainer) -> None:
        """Before the first forward of a step; `trainer.step` is the index of this step."""

    def on_gradients_ready(self, trainer: Trainer) -> None:
        """After the last backward of a step, before the optimizer steps."""

    def on_step_end(self, trainer: Trainer) -> Decision:
        """After the optimizer stepped; `trainer.step` now counts this step as completed."""
        return CONTINUE

    def collect_metrics(self, trainer: Trainer) -> dict[str, Any]:
        """Entries for the record of a logged step. Called on logged steps only."""
        return {}

    def on_metrics(self, trainer: Trainer, record: dict[str, Any]) -> Decision:
        """A complete record, equal on all ranks."""
        return CONTINUE

    def on_statistics(self, trainer: Trainer, values: dict[str, float]) -> Decision:
        """Stability statistics of the step just completed, combined over ranks."""
        return CONTINUE

    def on_profiles(self, trainer: Trainer, profiles: dict[str, list[float]]) -> None:
        """Statistics with a number for each head, bin or position, of the same step and right after `on_statistics`;
        not a number where nothing was measured."""

    def on_evaluation(self, trainer: Trainer, results: dict[str, EvaluationResult]) -> Decision:
        """Held-out losses by set name."""
        return CONTINUE

    def on_samples(self, trainer: Trainer, samples: Sequence[Sample]) -> None:
        """Texts that the model has generated, on rank 0 alone."""

    def on_health(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """How the processes and machines of the run fared since the record before, on rank 0 alone."""

    def on_alert(self, trainer: Trainer, alert: Alert) -> None:
        """A person should look at this; on all ranks where it is about figures that all have, else on rank 0 alone."""

    def on_save_failed(self, trainer: Trainer, problems: dict[int, str]) -> None:
        """The checkpoint that was being written is given up: rank -> what failed there, equal on all ranks."""

    def on_mirror_failed(self, trainer: Trainer, problem: str) -> None:
        """A checkpoint could not be copied to checkpoint.mirror; equal on all ranks."""

    def on_rollback(self, trainer: Trainer, rollback: Rollback, left: int) -> None:
        """The run went back: `trainer.step` counts as completed what is so again, `left` steps were before.

        `rollback.skip` says of how many steps the samples are left out. `load_state_dict` has been called. The step
        that was under way had no on_step_end.
        """

    def on_run_end(self, trainer: Trainer, outcome: str) -> None:
        """The run stops: `outcome` is "complete", "stopped" or "failed". Also called where on_run_start was not."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; {} when the run begins."""

"""The hooks that a run offers. Every concern beside the training step itself is a callback, one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.evaluate import EvaluationResult
    from train.trainer import Trainer


class Callback:
    """All hooks do nothing by default. They run on every rank, in the trainer's order (on_run_end: reversed).

    `state_dict` is saved in each checkpoint (rank 0's copy, JSON values only) and given back on resume.
    """

    def on_run_start(self, trainer: Trainer) -> None:
        """After resuming, before the first step."""

    def on_step_start(self, trainer: Trainer) -> None:
        """Before the first forward of a step; `trainer.step` is the index of this step."""

    def on_gradients_ready(self, trainer: Trainer) -> None:
        """After the last backward of a step, before the optimizer steps."""

    def on_step_end(self, trainer: Trainer) -> None:
        """After the optimizer stepped; `trainer.step` now counts this step as completed."""

    def collect_metrics(self, trainer: Trainer) -> dict[str, Any]:
        """Entries for the record of a logged step. Called on logged steps only."""
        return {}

    def on_metrics(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """A complete record, equal on all ranks."""

    def on_statistics(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Stability statistics of the step just completed, combined over ranks."""

    def on_evaluation(self, trainer: Trainer, results: dict[str, EvaluationResult]) -> None:
        """Held-out losses by set name."""

    def on_run_end(self, trainer: Trainer, outcome: str) -> None:
        """The run stops: `outcome` is "complete", "stopped" or "failed"."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

"""tensorboard/: the run's figures and samples as event files, `tensorboard --logdir runs` shows them."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.callbacks.base import Callback
from train.decisions import CONTINUE, Decision, Rollback
from train.health.record import health_figures

if TYPE_CHECKING:
    from train.callbacks.samples import Sample
    from train.evaluate import EvaluationResult
    from train.trainer import Trainer

FOLDER = "tensorboard"


def missing_tensorboard() -> list[str]:
    """The problem where the package is not installed, as a line for the user."""
    if importlib.util.find_spec("tensorboard") is not None:
        return []
    return [
        "logging.tensorboard: the package tensorboard is not installed; pip install 'xlstm-pretrain[tensorboard]', or "
        "set logging.tensorboard=false"
    ]


class TensorBoardLogger(Callback):
    """Logs on rank 0, under W&B's names of figures; all statistics under `statistics`.

    Each start and each rollback begins an event file, which tells TensorBoard the step from which earlier ones count
    no more: the curves are those of one run.
    """

    def __init__(self) -> None:
        self._writer: Any = None

    def on_run_start(self, trainer: Trainer) -> None:
        if trainer.is_main:
            self._open(trainer)

    def on_rollback(self, trainer: Trainer, rollback: Rollback, left: int) -> None:
        if self._writer is not None:
            self._writer.close()
            self._open(trainer)

    def on_metrics(self, trainer: Trainer, record: dict[str, Any]) -> Decision:
        self._log(trainer, {f"train/{key}": value for key, value in record.items() if key not in ("kind", "step")})
        return CONTINUE

    def on_statistics(self, trainer: Trainer, values: dict[str, float]) -> Decision:
        self._log(trainer, {f"statistics/{name}": value for name, value in values.items()})
        return CONTINUE

    def on_evaluation(self, trainer: Trainer, results: dict[str, EvaluationResult]) -> Decision:
        figures: dict[str, float] = {}
        for name, result in results.items():
            figures |= {f"evaluation/{name}/loss": result.loss, f"evaluation/{name}/perplexity": result.perplexity}
        self._log(trainer, figures)
        return CONTINUE

    def on_health(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self._log(trainer, health_figures(record))

    def on_samples(self, trainer: Trainer, samples: Sequence[Sample]) -> None:
        if self._writer is not None:
            for number, sample in enumerate(samples):
                # TensorBoard reads texts as Markdown: four spaces keep theirs as it is.
                text = "".join(f"    {line}\n" for line in (sample.prompt + sample.text).splitlines())
                self._writer.add_text(f"samples/{number}", text, trainer.step)
            self._writer.flush()

    def on_run_end(self, trainer: Trainer, outcome: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, trainer: Trainer) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(trainer.run_directory) / FOLDER
        self._writer = SummaryWriter(str(folder), purge_step=trainer.step + 1)

    def _log(self, trainer: Trainer, figures: Mapping[str, float | None]) -> None:
        if self._writer is None:
            return
        for name, value in figures.items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(name, value, trainer.step)
        self._writer.flush()

"""metrics.jsonl: one JSON object a line, what the run measured and when.

The first line is the header, `{"kind": "header", "format_version": 1, "step": 0}`. Each further line has `step`, the
number of completed steps, and a `kind`:

- "train": the record of a logged step, by `Trainer` and the callbacks (keys in docs/training.md).
- "evaluation": `set`, `loss` (nats per token), `perplexity`, `tokens` (scored) of one held-out set.
- "statistics": `values`, the stability statistics by name.
- "profiles": `values`, the statistics with a number for each head, bin or position, lists by name.
- "health": how processes and machines fare, by `callbacks.health`.

A number that is not finite is written as null: JSON has no other word for it, and events.jsonl tells which it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from train.callbacks.base import Callback
from train.callbacks.step_lines import StepLines
from train.decisions import CONTINUE, Decision, Rollback
from train.run_directory import read_versioned_lines

if TYPE_CHECKING:
    from train.evaluate import EvaluationResult
    from train.trainer import Trainer

FILE_NAME = "metrics.jsonl"
FORMAT_VERSION = 1
# Of any number that a run measures or counts; what draws has no words for larger ones.
_LARGEST = 1e30
_TRAIN_FIGURES = (
    "tokens",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "mfu_exact",
    "memory_gib",
    "skipped_steps",
)
_HEADER = {"kind": "header", "format_version": FORMAT_VERSION, "step": 0}


class MetricsFile(Callback):
    """Appends to metrics.jsonl on rank 0. Where a run resumes or goes back, what it will measure again is removed."""

    def __init__(self) -> None:
        self._file: StepLines | None = None

    def on_run_start(self, trainer: Trainer) -> None:
        if trainer.is_main:
            self._go_on_from(trainer)

    def on_rollback(self, trainer: Trainer, rollback: Rollback, left: int) -> None:
        if self._file is not None:
            self._file.close()
            self._go_on_from(trainer)

    def _go_on_from(self, trainer: Trainer) -> None:
        self._file = StepLines(Path(trainer.run_directory) / FILE_NAME, _HEADER, trainer.step)

    def on_metrics(self, trainer: Trainer, record: dict[str, Any]) -> Decision:
        self._append({"kind": "train", **record})
        return CONTINUE

    def on_statistics(self, trainer: Trainer, values: dict[str, float]) -> Decision:
        self._append({"kind": "statistics", "step": trainer.step, "values": values})
        return CONTINUE

    def on_profiles(self, trainer: Trainer, profiles: dict[str, list[float]]) -> None:
        # Seven digits are what was measured in.
        values = {name: [float(f"{number:.7g}") for number in numbers] for name, numbers in profiles.items()}
        self._append({"kind": "profiles", "step": trainer.step, "values": values})

    def on_evaluation(self, trainer: Trainer, results: dict[str, EvaluationResult]) -> Decision:
        for name, result in results.items():
            self._append(
                {
                    "kind": "evaluation",
                    "step": trainer.step,
                    "set": name,
                    "loss": result.loss,
                    "perplexity": result.perplexity,
                    "tokens": result.tokens,
                }
            )
        return CONTINUE

    def on_health(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self._append({"kind": "health", "step": trainer.step, **record})

    def on_run_end(self, trainer: Trainer, outcome: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.append(line)


def read_metrics(run_directory: Path) -> list[dict[str, Any]]:
    """Every measurement of a run's metrics.jsonl, in order, without the header. Raises as `read_versioned_lines` does.

    A line that is no measurement is passed over: another program, or an editor, left it.
    """
    lines = read_versioned_lines(Path(run_directory) / FILE_NAME, FORMAT_VERSION)[1:]
    return [line for line in lines if is_measurement(line)]


def is_measurement(line: dict[str, Any]) -> bool:
    """Whether a line has a step, a kind, and what readers take for granted of it."""
    kind, step = line.get("kind"), line.get("step")
    if not isinstance(kind, str) or type(step) is not int or not 0 <= step < _LARGEST:
        return False
    if kind == "train":
        return line.get("tokens") is not None and all(_is_figure(line.get(key)) for key in _TRAIN_FIGURES)
    if kind == "evaluation":
        return (
            isinstance(line.get("set"), str)
            and "loss" in line
            and all(_is_figure(line.get(key)) for key in ("loss", "perplexity"))
        )
    if kind == "statistics":
        return isinstance(line.get("values"), dict) and all(map(_is_figure, line["values"].values()))
    if kind == "profiles":
        values = line.get("values")
        return isinstance(values, dict) and all(
            isinstance(numbers, list) and all(map(_is_figure, numbers)) for numbers in values.values()
        )
    return True


def _is_figure(value: object) -> bool:
    """Whether it can be drawn; what is not finite is not drawn, as null."""
    return value is None or (type(value) in (int, float) and not abs(cast(float, value)) > _LARGEST)

"""csv/: the figures of metrics.jsonl as tables, for spreadsheets and data frames.

    train.csv        one row a logged step, one column a figure
    evaluation.csv   one row a held-out set and step
    statistics.csv   step, name, value: one row a statistic and step

The tables are what metrics.jsonl says, from its first line on: they are written anew where a run begins, resumes or
goes back, and each step stands in them once. A number that is not finite is an empty field.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.callbacks.base import Callback
from train.callbacks.metrics_file import read_metrics
from train.decisions import CONTINUE, Decision, Rollback
from train.run_directory import write_atomically

if TYPE_CHECKING:
    from train.evaluate import EvaluationResult
    from train.trainer import Trainer

FOLDER = "csv"


class CsvTables(Callback):
    """Writes on rank 0, behind `MetricsFile`, whose file has every line that the tables have."""

    def __init__(self) -> None:
        self._columns: dict[str, list[str]] = {}

    def on_run_start(self, trainer: Trainer) -> None:
        self._write_anew(trainer)

    def on_rollback(self, trainer: Trainer, rollback: Rollback, left: int) -> None:
        self._write_anew(trainer)

    def on_metrics(self, trainer: Trainer, record: dict[str, Any]) -> Decision:
        self._append(trainer, "train", [record])
        return CONTINUE

    def on_statistics(self, trainer: Trainer, values: dict[str, float]) -> Decision:
        self._append(trainer, "statistics", _of_statistics({"step": trainer.step, "values": values}))
        return CONTINUE

    def on_evaluation(self, trainer: Trainer, results: dict[str, EvaluationResult]) -> Decision:
        rows = [{"step": trainer.step, "set": name, **vars(result)} for name, result in results.items()]
        self._append(trainer, "evaluation", rows)
        return CONTINUE

    def _write_anew(self, trainer: Trainer) -> None:
        if not trainer.is_main:
            return
        lines = read_metrics(Path(trainer.run_directory))
        tables: dict[str, list[dict[str, Any]]] = {kind: [] for kind in ("train", "evaluation", "statistics")}
        for line in lines:
            if line["kind"] in tables:
                tables[line["kind"]] += _of_statistics(line) if line["kind"] == "statistics" else [line]
        for kind, rows in tables.items():
            self._columns[kind] = list(dict.fromkeys(key for row in rows for key in row if key != "kind"))
            _file(trainer, kind).parent.mkdir(exist_ok=True)
            write_atomically(_file(trainer, kind), _as_csv(self._columns[kind], rows, with_header=bool(rows)))

    def _append(self, trainer: Trainer, kind: str, rows: Sequence[dict[str, Any]]) -> None:
        if not trainer.is_main:
            return
        if {key for row in rows for key in row} - {"kind"} - set(self._columns[kind]):
            # The first rows, or figures that an earlier version did not have: metrics.jsonl has these rows already.
            self._write_anew(trainer)
            return
        with _file(trainer, kind).open("a", encoding="utf-8", newline="") as file:
            file.write(_as_csv(self._columns[kind], rows, with_header=False))


def _file(trainer: Trainer, kind: str) -> Path:
    return Path(trainer.run_directory) / FOLDER / f"{kind}.csv"


def _of_statistics(line: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"step": line["step"], "name": name, "value": value} for name, value in line["values"].items()]


def _as_csv(columns: Sequence[str], rows: Iterable[dict[str, Any]], with_header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    if with_header:
        writer.writeheader()
    for row in rows:
        # inf is left out as well: inf - inf is no number.
        finite = {key: value for key, value in row.items() if not isinstance(value, float) or value - value == 0}
        writer.writerow(finite)
    return text.getvalue()

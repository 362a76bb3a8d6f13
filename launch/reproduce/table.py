"""What the runs of a reproduction found: the best rate of each model and task, beside what is published."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.reproduce.config import ReproduceConfig
from launch.reproduce.plan import Trial
from launch.reproduce.published import PUBLISHED, PublishedResult


@dataclass(frozen=True)
class Cell:
    """One model on one task, at its best learning rate.

    Attributes:
        accuracies: case of the suite -> the mean over the seeds.
        least, most: of the accuracies of a case over the seeds, by case.
        chance: of a guess.
        learning_rate: the best one.
        scored, planned: runs at that rate that are scored, and that there are to be.
        published: None where nothing is.
    """

    model: str
    task: str
    accuracies: dict[str, float]
    least: dict[str, float]
    most: dict[str, float]
    chance: float | None
    learning_rate: float
    scored: int
    planned: int
    published: PublishedResult | None

    @property
    def scaled(self) -> float | None:
        """The mean over the cases of the accuracies, scaled so that chance is 0."""
        if self.chance is None or self.chance >= 1:
            return None
        return statistics.fmean((value - self.chance) / (1 - self.chance) for value in self.accuracies.values())

    @property
    def verdict(self) -> str:
        """How ours compares with what is published; empty where nothing is."""
        if self.published is None:
            return ""
        return self.published.judge(min(self.accuracies.values()), self.scaled)


def cells(config: ReproduceConfig, trials: Sequence[Trial], results: dict[str, dict[str, Any]]) -> list[Cell]:
    """The table, task by task. `results`: of each scored run, by the name of its row: case -> figures.

    The best rate is that with the highest mean accuracy over cases and seeds, among the rates of which a run is scored.
    """
    found = []
    pairs = dict.fromkeys((trial.model, trial.task) for trial in trials)
    published = {} if config.published is None else PUBLISHED[config.published].results
    for model, task in pairs:
        of_pair = [trial for trial in trials if (trial.model, trial.task) == (model, task)]
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for trial in of_pair:
            if trial.row.name in results:
                by_rate.setdefault(trial.learning_rate, []).append(results[trial.row.name])
        if not by_rate:
            continue
        rate = max(by_rate, key=lambda one: statistics.fmean(_accuracy(run) for run in by_rate[one]))
        runs = by_rate[rate]
        values = {case: [run[case]["accuracy"] for run in runs] for case in runs[0]}
        found.append(
            Cell(
                model=model,
                task=task,
                accuracies={case: statistics.fmean(of_case) for case, of_case in values.items()},
                least={case: min(of_case) for case, of_case in values.items()},
                most={case: max(of_case) for case, of_case in values.items()},
                chance=next(iter(runs[0].values())).get("chance"),
                learning_rate=rate,
                scored=len(runs),
                planned=sum(trial.learning_rate == rate for trial in of_pair),
                published=published.get((model, task)),
            )
        )
    return found


def _accuracy(run: dict[str, Any]) -> float:
    return statistics.fmean(case["accuracy"] for case in run.values())


def as_text(config: ReproduceConfig, found: Sequence[Cell]) -> str:
    """For a terminal: a line for each model and task."""
    heads, rows = rows_of(config, found)
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def rows_of(config: ReproduceConfig, found: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table. What a case is called is what stands behind its last slash, as a column."""
    columns = list(dict.fromkeys(_column(case) for cell in found for case in cell.accuracies))
    heads = ["task", "model", *columns, "chance", "scaled", "published", "", "rate", "runs"]
    rows = []
    for cell in found:
        by_column = {_column(case): _range(cell, case) for case in cell.accuracies}
        rows.append(
            [
                cell.task,
                config.models[cell.model].label,
                *(by_column.get(column, "") for column in columns),
                "" if cell.chance is None else f"{cell.chance:.2f}" if cell.chance >= 0.01 else f"{cell.chance:.1e}",
                "" if cell.scaled is None else f"{cell.scaled:.2f}",
                "" if cell.published is None else str(cell.published),
                cell.verdict,
                f"{cell.learning_rate:g}",
                f"{cell.scored}/{cell.planned}",
            ]
        )
    return heads, rows


def _column(case: str) -> str:
    return f"at {case.rpartition('/')[2]}"


def _range(cell: Cell, case: str) -> str:
    mean, least, most = (values[case] for values in (cell.accuracies, cell.least, cell.most))
    return f"{mean:.3f}" if cell.scored == 1 or most - least < 0.0005 else f"{mean:.3f} ({least:.2f}-{most:.2f})"

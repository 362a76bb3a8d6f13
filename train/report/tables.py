"""The tables of compared runs: a row for each quantity, a column for each run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.figure import column, engineering
from train.report.curves import held_out_sets
from train.report.runs import ComparedRun
from train.stored_configuration import differences, written

# Of a run: how it is called and where it lies differ always.
_NOT_COMPARED = ("name", "run_root")
Row = list[str]


def overview(runs: Sequence[ComparedRun]) -> list[Row]:
    """State, length, size and origin of each run."""
    return _without_empty(
        [
            _row("state", runs, _state),
            _row("steps", runs, _steps),
            _row("tokens", runs, lambda run: engineering(run.train[-1]["tokens"]) if run.train else ""),
            _row("parameters", runs, lambda run: "" if run.parameters is None else f"{run.parameters:,}"),
            _row("training FLOPs", runs, _flops),
            _row("began from", runs, _origin),
            _row("starts", runs, lambda run: _count(run, ("start", "resume"))),
        ]
    )


def losses(runs: Sequence[ComparedRun]) -> list[Row]:
    """The latest training loss and that of every held-out set, with the step where that is not the run's last."""
    rows = [_row("training, running mean", runs, _training_loss)]
    for name in held_out_sets(runs):
        rows.append([f"held out: {name}", *(_last_of_set(run, name) for run in runs)])
    return _without_empty(rows)


def evaluations(runs: Sequence[ComparedRun]) -> list[Row]:
    """What `python -m train.evaluate` found last, of each set."""
    found = [_latest_results(run) for run in runs]
    names = dict.fromkeys(name for results in found for name in results)
    return [[name, *(results.get(name, "") for results in found)] for name in names]


def suites(runs: Sequence[ComparedRun]) -> dict[str, list[Row]]:
    """Suite -> what each run's latest result of it says, a row for each figure of each case."""
    found: dict[str, list[Row]] = {}
    for suite in dict.fromkeys(name for run in runs for name in run.suites):
        results = [run.suites.get(suite, {}).get("results", {}) for run in runs]
        cases = dict.fromkeys(case for result in results for case in result)
        of_cases = {case: [result.get(case, {}) for result in results] for case in cases}
        rows = [
            [f"{case}: {name}", *(_figure(figures.get(name)) for figures in of_case)]
            for case, of_case in of_cases.items()
            for name in dict.fromkeys(name for figures in of_case for name in figures)
        ]
        steps = [run.suites.get(suite, {}).get("step") for run in runs]
        found[suite] = _without_empty([["after step", *(_figure(step) for step in steps)], *rows])
    return found


def stability(runs: Sequence[ComparedRun]) -> list[Row]:
    """Bad steps, and how far gradients went."""
    return _without_empty(
        [
            _row(
                "skipped steps", runs, lambda run: f"{run.train[-1].get('skipped_steps') or 0:,}" if run.train else ""
            ),
            _row("rollbacks", runs, lambda run: _count(run, ("rollback",))),
            _row("spikes of the loss", runs, lambda run: _spikes(run, "loss")),
            _row("spikes of the gradient norm", runs, lambda run: _spikes(run, "grad_norm")),
            _row("gradient norm, median", runs, lambda run: _of_figure(run, "grad_norm", np.median, ".3g")),
            _row("gradient norm, greatest", runs, lambda run: _of_figure(run, "grad_norm", np.max, ".3g")),
            _row("gradient norm, greatest / median", runs, _worst_gradient),
            _row("alerts", runs, lambda run: _count(run, ("alert",))),
            _row("errors", runs, lambda run: _count(run, ("error",))),
        ]
    )


def throughput(runs: Sequence[ComparedRun]) -> list[Row]:
    """Medians over the logged steps, and the most memory."""
    keys = (
        ("tokens per second", "tokens_per_second", np.median, ",.0f"),
        ("tokens per second and process", "tokens_per_second_per_gpu", np.median, ",.0f"),
        ("seconds a step", "step_seconds", np.median, ".3g"),
        ("model FLOPs utilisation, exact", "mfu_exact", np.median, ".1%"),
        ("share of a step that waits for data", "data_wait_fraction", np.median, ".2%"),
        ("memory of a process, GiB", "memory_gib", np.max, ".1f"),
    )
    return _without_empty(
        [text, *(_of_figure(run, key, combine, places) for run in runs)] for text, key, combine, places in keys
    )


def configuration(runs: Sequence[ComparedRun]) -> list[Row]:
    """The keys in which the configurations differ, and only these; runs without a configuration have empty cells."""
    known = [run.configuration for run in runs if run.configuration is not None]
    changed = [differences(known[0], other) for other in known[1:]]
    keys = sorted({key for found in changed for key in found if key not in _NOT_COMPARED})
    return [[key, *(_value(run, key) for run in runs)] for key in keys]


def _row(name: str, runs: Sequence[ComparedRun], text: Callable[[ComparedRun], str]) -> Row:
    return [name, *map(text, runs)]


def _without_empty(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if any(row[1:])]


def _state(run: ComparedRun) -> str:
    if run.summary is None:
        return "not known"
    why = run.summary["reason"]
    return run.summary["state"] + (f" ({why})" if why and run.summary["state"] != "running" else "")


def _steps(run: ComparedRun) -> str:
    total = None if run.summary is None else run.summary["total_steps"]
    return f"{run.train[-1]['step'] if run.train else 0:,}" + ("" if total is None else f" of {total:,}")


def _flops(run: ComparedRun) -> str:
    if not run.train or run.flops_per_token is None:
        return ""
    return f"{run.train[-1]['tokens'] * run.flops_per_token:.3g}"


def _origin(run: ComparedRun) -> str:
    origin = next((event for event in run.events if event["event"] in ("branch", "initialise")), None)
    if origin is None:
        return ""
    parent, step = origin.get("run"), origin.get("step")
    place = origin.get("source") if not isinstance(parent, str) or step is None else f"{Path(parent).name}@{step}"
    return f"{place} ({origin['event']})"


def _count(run: ComparedRun, kinds: tuple[str, ...]) -> str:
    return f"{sum(event['event'] in kinds for event in run.events):,}" if run.events else ""


def _skipped(run: ComparedRun) -> str:
    return f"{run.train[-1].get('skipped_steps') or 0:,}" if run.train else ""


def _spikes(run: ComparedRun, quantity: str) -> str:
    kinds = Counter(event.get("quantity") for event in run.events if event["event"] == "spike")
    return f"{kinds[quantity]:,}" if run.events else ""


def _training_loss(run: ComparedRun) -> str:
    values = run.figures("loss")[1]
    finite = values[np.isfinite(values)]
    return f"{finite[-1]:.4f}" if len(finite) else ""


def _last_of_set(run: ComparedRun, name: str) -> str:
    steps, values = run.held_out(name)
    if not len(steps):
        return ""
    value = "not finite" if math.isnan(values[-1]) else f"{values[-1]:.4f}"
    last = run.train[-1]["step"] if run.train else steps[-1]
    return value if steps[-1] >= last else f"{value} (step {steps[-1]:,.0f})"


def _figure(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if abs(value) < 100 else f"{value:,.1f}"


def _latest_results(run: ComparedRun) -> dict[str, str]:
    found = {}
    for document in sorted(run.documents, key=lambda document: document["step"] or 0):
        for name, figures in document["results"].items():
            loss = figures.get("loss")
            if isinstance(loss, int | float):
                at = "" if document["step"] is None else f" (step {document['step']:,})"
                found[name] = f"{loss:.4f}{at}"
    return found


def _of_figure(run: ComparedRun, key: str, combine: Callable[[np.ndarray], np.floating], places: str) -> str:
    values = column(run.train, key)
    finite = values[np.isfinite(values)]
    return format(float(combine(finite)), places) if len(finite) else ""


def _worst_gradient(run: ComparedRun) -> str:
    values = column(run.train, "grad_norm")
    finite = values[np.isfinite(values)]
    return f"{finite.max() / np.median(finite):.3g}" if len(finite) and np.median(finite) > 0 else ""


def _value(run: ComparedRun, key: str) -> str:
    if run.configuration is None:
        return ""
    value: Any = run.configuration
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return "-"
        value = value[part]
    return written(value)

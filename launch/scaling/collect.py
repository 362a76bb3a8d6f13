"""The table of runs from folders of runs and sweeps: sizes and FLOPs counted, the last held-out loss."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf import ConfigError, to_dataclass
from launch.scaling.flops import run_flops
from launch.scaling.runs import RunTable, ScalingRun, mark_repeated, read_runs
from launch.sweep.manifest import TRUNK, Row, SweepFolder, is_sweep, read_manifest
from model.accounting import count_parameters
from model.config import ModelConfig
from train.run_directory import RunDirectory
from train.run_summary import summarise
from train.stored_configuration import in_current_form, read_configuration


def collect(paths: Sequence[Path], held_out: str | None = None) -> RunTable:
    """One row for each run's folder, each row of a sweep's manifest and each row of CSV files, in the order in which
    they are named.

    A run that has not ended, or has no usable loss, is in the table too, with the reason in `excluded`. The family is
    the kinds of a model's blocks, the most frequent first, such as "mlstm" or "mlstm+slstm"; that of a run of a sweep
    is what the manifest says, as is its budget.

    Args:
        held_out: which held-out set the loss is of; None: the one that a run scores, where it scores one.

    Raises ConfigError where a path is neither a run's folder, a sweep's nor a file, a run is not what the manifest
    says, or scores several sets and `held_out` is None; ValueError as `read_runs` does.
    """
    runs: list[ScalingRun] = []
    notes: list[str] = []
    problems: list[str] = []
    for path in paths:
        if path.is_file():
            table = read_runs([path])
            runs += table.runs
            notes += table.notes
            continue
        try:
            runs += _rows_of_sweep(SweepFolder(path), held_out) if is_sweep(path) else [_row(path, held_out)]
        except ConfigError as error:
            problems += [line if str(path) in line else f"{path}: {line}" for line in error.problems]
    if problems:
        raise ConfigError(problems)
    return RunTable(mark_repeated(runs), notes)


def _rows_of_sweep(folder: SweepFolder, held_out: str | None) -> list[ScalingRun]:
    rows, problems = [], []
    for row in read_manifest(folder).rows:
        try:
            rows.append(_row_of_sweep(folder.run(row), row, held_out))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return rows


def _row_of_sweep(path: Path, row: Row, held_out: str | None) -> ScalingRun:
    if not (path / "config.yaml").is_file():
        planned = (float(row.parameters), float(row.tokens), row.flops, row.context, math.nan)
        return ScalingRun(row.name, row.family, *planned, budget=row.budget, excluded="has not begun")
    run = replace(_row(path, held_out), family=row.family, budget=row.budget)
    if (run.parameters, run.context) != (row.parameters, row.context):
        raise ConfigError(
            [
                f"{path}: is another run than the manifest's row {row.name}: {run.parameters:,.0f} parameters and "
                f"{run.context:,} tokens of context, not {row.parameters:,} and {row.context:,}; move it away"
            ]
        )
    if row.role == TRUNK:
        return replace(run, excluded="is the trunk of its branches: its rate has not fallen")
    if not run.excluded and run.tokens != row.tokens:
        return replace(run, excluded=f"ended after {run.tokens:,.0f} of {row.tokens:,} tokens")
    return run


def _row(path: Path, held_out: str | None) -> ScalingRun:
    summary = summarise(path)
    config = in_current_form(read_configuration(RunDirectory(path).config))
    model = to_dataclass(ModelConfig, config["model"])
    context, tokens = config["training"]["sequence_length"], float(summary["tokens"])
    loss, reason = _loss(path, summary, held_out)
    return ScalingRun(
        run=summary["name"],
        family="+".join(kind for kind, _ in Counter(model.block_kinds()).most_common()),
        parameters=float(count_parameters(model).total),
        tokens=tokens or math.nan,
        flops=run_flops(model, context, tokens) or math.nan,
        context=context,
        loss=loss,
        excluded=reason,
    )


def _loss(path: Path, summary: dict[str, Any], held_out: str | None) -> tuple[float, str]:
    """(nats per token, why the run is excluded or "")."""
    if summary["state"] != "complete":
        why = f" ({summary['reason']})" if summary["reason"] else ""
        return math.nan, f"{summary['state']}{why}, after {summary['steps']:,} steps"
    scored = summary["held_out"]
    if held_out is None and len(scored) > 1:
        raise ConfigError([f"{path}: scores {', '.join(scored)}; say which loss counts with --set"])
    if held_out is not None and scored and held_out not in scored:
        raise ConfigError([f"{path}: scores no set {held_out}; choose one of {', '.join(scored)} with --set"])
    last = next(iter(scored.values()), None) if held_out is None else scored.get(held_out)
    if last is None or last["step"] != summary["steps"]:
        return math.nan, "has no held-out loss after its last step (evaluation.sets, evaluation.interval)"
    if last["loss"] is None:
        return math.nan, "its held-out loss is not finite"
    return float(last["loss"]), ""

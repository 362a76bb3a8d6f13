"""`python -m train.evaluate MODEL suite=NAME`: one suite on one model, the result a line of evaluations.jsonl."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from conf import ConfigError
from model.loading import load
from train.checkpoints.state import read_state
from train.config import RunConfig
from train.evaluate.suites.base import Subject, SuiteResult
from train.evaluate.suites.results import FILE, append_result, read_results, result_line
from train.evaluate.suites.suites import compose_suite
from train.evaluate.suites.wandb_results import send_to_wandb
from train.evaluate.target import Target, compose_for
from train.parallel.mesh import join_mesh

# What suites read of a run's configuration, beside their own settings.
_READ = ("precision", "corpus.", "training.sequence_length", "parallel.collective_timeout_seconds", "logging.wandb")


def names_suite(overrides: list[str]) -> bool:
    """Whether a suite is asked for, not held-out text."""
    return any(override.startswith("suite=") for override in overrides)


def run_suite(target: Target, overrides: list[str], output: Path | None) -> None:
    """Score `target` by the suite that `overrides` choose, print its table and append the result.

    `output`: the file that the line is appended to; None: evaluations.jsonl of the run, or beside the weights.

    Raises ConfigError, DataError, OSError.
    """
    chosen = [override.partition("=")[2] for override in overrides if override.startswith("suite=")]
    if len(chosen) != 1:
        raise ConfigError([f"suite: name one at a time, not {' and '.join(chosen)}"])
    (name,) = chosen
    of_suite = [override for override in overrides if override.lstrip("+~").startswith("suite.")]
    suite, settings = compose_suite(name, of_suite)
    others = [one for one in overrides if one not in of_suite and not one.startswith("suite=")]
    if strange := [one for one in others if not one.lstrip("+~").startswith(_READ)]:
        raise ConfigError(
            [f"{one}: suites do not read it; leave it out, or see the keys below suite" for one in strange]
        )
    config = _configuration(target, others)
    file = output or (target.run or target.located.weights) / FILE
    # Before the work: a file of a later version is not added to.
    read_results(file)
    mesh = join_mesh(timedelta(seconds=config.parallel.collective_timeout_seconds))
    try:
        dtype = config.precision.weight_dtype(config.parallel.zero_stage)
        model = load(target.path, device=mesh.device, dtype=dtype).eval()
        subject = Subject(model, target.located, config, mesh, target.run is not None)
        with _folder(file.parent / "evaluations" / name, mesh.is_main) as folder:
            result = suite.run(subject, settings, folder)
        if mesh.is_main:
            line = result_line(name, settings, result, **_about(target))
            append_result(file, line)
            print(table(result))
            print(f"appended to {file}")
            if target.run is not None:
                send_to_wandb(target.run, config.logging.wandb, line)
    finally:
        mesh.close()


@contextlib.contextmanager
def _folder(path: Path, is_main: bool) -> Iterator[Path]:
    """`path`, made by rank 0, for what a suite leaves; what is empty behind it goes."""
    if not is_main:
        yield path
        return
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.rmdir()
            path.parent.rmdir()


def _configuration(target: Target, overrides: list[str]) -> RunConfig:
    """Of the run, or the defaults; only what suites read of it matters, so nothing else is looked at."""
    if target.run is None and not any(override.startswith("corpus.directory=") for override in overrides):
        overrides = ["corpus.directory=null", *overrides]
    return compose_for(target, overrides, lambda config: [])


def _about(target: Target) -> dict[str, Any]:
    step, tokens = None, None
    if target.checkpoint is not None:
        state = read_state(target.checkpoint)
        step, tokens = state.step, state.tokens
    return {"model": str(target.path), "step": step, "trained_tokens": tokens}


def table(result: SuiteResult) -> str:
    """The cases as lines: a column for each figure that any of them has."""
    figures = list(dict.fromkeys(name for case in result.cases.values() for name in case.figures))
    head = ["case", *figures, "chance", "scaled", "examples"]
    rows = [
        [
            name,
            *(_number(case.figures.get(figure)) for figure in figures),
            _number(case.chance),
            _number(case.scaled_accuracy),
            f"{case.examples:,}",
        ]
        for name, case in result.cases.items()
    ]
    shown = [column for column in zip(head, *rows, strict=True) if any(cell for cell in column[1:])]
    widths = [max(map(len, column)) for column in shown]
    lines = [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(row))
        for row in (list(zip(line, widths, strict=True)) for line in zip(*shown, strict=True))
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in result.notes)])


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4f}"

"""Runs in the process of the test, on `PlainEngine`; their files are read back as those of any run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf import compose
from tests.train.plain_engine import PlainEngine
from train.callbacks.base import Callback
from train.config import RunConfig
from train.run import train


def run_plainly(overrides: Sequence[str], callbacks: Sequence[Callback] = ()) -> int:
    """Train on PlainEngine; returns the exit code."""
    return train(compose(RunConfig, "train", overrides), callbacks, PlainEngine)


def figures(run_directory: Path) -> list[tuple[Any, ...]]:
    """What a run computed, by its metrics.jsonl: (step, loss, gradient norm, rate) and (step, set, held-out loss)."""
    found: list[tuple[Any, ...]] = []
    for line in map(json.loads, (run_directory / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "train":
            found.append((line["step"], line["loss"], line["grad_norm"], line["learning_rate"]))
        if line["kind"] == "evaluation":
            found.append((line["step"], line["set"], line["loss"]))
    return found


def train_losses(run_directory: Path) -> dict[int, float]:
    """step -> loss of the logged steps."""
    return {line[0]: line[1] for line in figures(run_directory) if len(line) == 4}

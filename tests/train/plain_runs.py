"""Runs in the process of the test, on `PlainEngine`; their files are read back as those of any run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf import compose
from tests.runs import TINY_RUN
from tests.train.plain_engine import PlainEngine
from train.callbacks.base import Callback
from train.config import RunConfig
from train.run import train


def run_plainly(
    overrides: Sequence[str], callbacks: Sequence[Callback] = (), engine: type[PlainEngine] = PlainEngine
) -> int:
    """Train on such an engine; returns the exit code."""
    return train(compose(RunConfig, "train", overrides), callbacks, engine)


def saved_run(root: Path, corpus: Path, *more: str) -> tuple[Path, list[str]]:
    """A run of two steps, each with a checkpoint: its folder below `root`, and what starts it with another length."""
    overrides = [f"run_root={root}", f"corpus.directory={corpus}", *TINY_RUN, "name=run", "parallel=zero0"]
    overrides += ["checkpoint.interval=1", *more]
    assert run_plainly([*overrides, "training.total_steps=2"]) == 0
    return root / "run", overrides


def copied_run(saved: tuple[Path, list[str]], root: Path) -> tuple[Path, list[str]]:
    """A copy of a `saved_run` below `root`, to be damaged, and what starts it."""
    folder, overrides = saved
    return shutil.copytree(folder, root / "run"), [*overrides, f"run_root={root}"]


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

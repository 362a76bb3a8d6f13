"""The gradient norm of every parameter at every step of a run, taken through the engine's fragments."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import torch

from train.callbacks.base import Callback
from train.trainer import Trainer

FILE_NAME = "gradient_norms.json"


class GradientNorms(Callback):
    """Writes {parameter: norm} of every step, before clipping, to a file in the run's folder."""

    def __init__(self) -> None:
        self._squares: list[dict[str, float]] = []

    def on_gradients_ready(self, trainer: Trainer) -> None:
        of_step: dict[str, float] = collections.defaultdict(float)
        for fragment in trainer.engine.fragments:
            gradient = fragment.gradient()
            if fragment.owned and gradient is not None:
                # In fp64: what is compared is the gradient, not the rounding of its norm.
                of_step[fragment.name] += float(gradient.to(torch.float64).square().sum())
        self._squares.append(dict(of_step))

    def on_run_end(self, trainer: Trainer, outcome: str) -> None:
        if outcome != "complete":
            return
        ranks = trainer.mesh.gather_objects(self._squares, group="world")
        if trainer.is_main:
            names = {name for rank in ranks for of_step in rank for name in of_step}
            norms = [
                {name: sum(rank[step].get(name, 0.0) for rank in ranks) ** 0.5 for name in sorted(names)}
                for step in range(len(self._squares))
            ]
            (trainer.run_directory / FILE_NAME).write_text(json.dumps(norms), encoding="utf-8")


def read_norms(run_directory: Path) -> list[dict[str, float]]:
    """{parameter: norm} of each step."""
    norms: list[dict[str, float]] = json.loads((run_directory / FILE_NAME).read_text(encoding="utf-8"))
    return norms

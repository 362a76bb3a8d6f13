"""A synthetic task and how long its examples are: the keys under `corpus.task`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SCORED = ("answer", "every")


@dataclass(frozen=True)
class TaskConfig:
    """Examples of a synthetic task, made while the run goes on, instead of a prepared corpus; one a sample."""

    # parity, even_pairs, cycle_navigation, modular_arithmetic, ... (docs/guides/evaluation.md).
    name: str
    # Words of the shortest example; lengths from here to training.sequence_length are alike likely.
    shortest: int = 2
    # answer: the answer to the whole example. every: also those to its beginnings, of tasks that have them.
    scored: str = "answer"
    # Of the task itself, by name.
    settings: dict[str, Any] = field(default_factory=dict)

"""Held-out losses: of a run while it trains, and of any model (`python -m train.evaluate`)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.evaluate.heldout import (
        EvaluationResult,
        EvaluationWindows,
        Scorer,
        evaluate,
        open_evaluation_corpora,
        open_sets,
        open_windows,
        parts_of_set,
    )

__all__ = [
    "EvaluationResult",
    "EvaluationWindows",
    "Scorer",
    "evaluate",
    "open_evaluation_corpora",
    "open_sets",
    "open_windows",
    "parts_of_set",
]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: the command line answers an interrupt before torch is there.
    if name in __all__:
        return getattr(import_module("train.evaluate.heldout"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

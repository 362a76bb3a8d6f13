"""Held-out losses: of a run while it trains, and of any model (`python -m train.evaluate`)."""

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

"""Published results, to stand beside ours. Figures of papers, each with its source; no more than the papers say.

`says` is for what is known in words alone: values that are only in a picture. "solved": an accuracy of 1 at the lengths
that were tested; "not solved": clearly less.
"""

from __future__ import annotations

from dataclasses import dataclass

SOLVED, NOT_SOLVED = "solved", "not solved"
# Scaled accuracies that differ by more are marked.
TOLERANCE = 0.1
# From this accuracy on a task counts as solved, below the other one it does not.
IS_SOLVED, IS_NOT_SOLVED = 0.99, 0.9


@dataclass(frozen=True)
class PublishedResult:
    """One result: a scaled accuracy, or words."""

    source: str
    scaled_accuracy: float | None = None
    says: str = ""

    def judge(self, accuracy: float, scaled: float | None) -> str:
        """How ours compares: "as published", "differs", or why neither can be said.

        `accuracy`: the least of ours over the lengths; `scaled`: the mean scaled accuracy over them.
        """
        if self.scaled_accuracy is not None:
            if scaled is None:
                return "ours has no chance level"
            return "as published" if abs(scaled - self.scaled_accuracy) <= TOLERANCE else "differs"
        if self.says == SOLVED:
            return "as published" if accuracy >= IS_SOLVED else "differs"
        return "as published" if accuracy < IS_NOT_SOLVED else "differs"

    def __str__(self) -> str:
        return self.says if self.scaled_accuracy is None else f"{self.scaled_accuracy:.2f}"


@dataclass(frozen=True)
class PublishedTable:
    """Results by (model, task), as conf/reproduce names both. `remarks`: what is known of the whole, a line each."""

    results: dict[tuple[str, str], PublishedResult]
    remarks: tuple[str, ...]


_MAIN = "arXiv 2405.04517, section 4.1: in words, the values are in a figure"
_SUPPLEMENT = "arXiv 2405.04517, appendix B.1: scaled accuracy"
_MODELS = ("xlstm_1_0", "xlstm_1_1", "xlstm_0_1")
_SCALED = {
    "odds_first": (0.15, 0.08, 0.09),
    "reverse_string": (0.22, 0.20, 0.14),
    "stack_manipulation": (0.25, 0.17, 0.13),
    "repetition": (0.28, 0.09, 0.09),
    "set": (0.17, 0.15, 0.17),
}
_PARITY = {
    ("xlstm_0_1", "parity"): PublishedResult(_MAIN, says=SOLVED),
    ("xlstm_1_1", "parity"): PublishedResult(_MAIN, says=SOLVED),
    ("xlstm_1_0", "parity"): PublishedResult(_MAIN, says=NOT_SOLVED),
    ("llama", "parity"): PublishedResult(_MAIN, says=NOT_SOLVED),
}
PUBLISHED = {
    "formal": PublishedTable(
        {
            **_PARITY,
            **{
                (model, task): PublishedResult(_SUPPLEMENT, scaled_accuracy=value)
                for task, values in _SCALED.items()
                for model, value in zip(_MODELS, values, strict=True)
            },
            ("xlstm_0_1", "s3"): PublishedResult("arXiv 2606.12364, of an sLSTM up to length 2048", says=SOLVED),
        },
        (
            "The paper draws lengths of 40 to 256 to test on; ours are the ends and places between, each by itself.",
            "Width, vocabulary and the form of the tasks are not published in full: ours are in "
            "docs/guides/evaluation.md. A difference may be theirs.",
        ),
    ),
    "mqar": PublishedTable(
        {},
        (
            "The values of arXiv 2405.04517, appendix B.2, are in a figure. It finds xLSTM[1:1] best of the models "
            "without attention, and flat in extrapolation.",
        ),
    ),
}

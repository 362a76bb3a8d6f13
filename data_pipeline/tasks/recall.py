"""Multi-query associative recall: pairs of key and value, then keys whose values are asked for.

Source: arXiv 2312.04927, section 4; in the sizes of arXiv 2405.04517, appendix B.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.tasks.base import Example, Problem, Task
from data_pipeline.tasks.draws import Draws
from data_pipeline.tasks.state_tracking import check_size


@dataclass(frozen=True)
class Recall:
    """Of multi-query associative recall."""

    # Pairs of key and value; each key is asked for once.
    pairs: int = 4
    # Words: one half are keys, the other half values.
    vocabulary: int = 8192
    # A query stands n places of two words behind the pairs with a probability in proportion to n ** (exponent - 1):
    # near ones are common.
    exponent: float = 0.01


class MultiQueryRecall(Task[Recall]):
    """key value key value ..., then queries among values that mean nothing; the answer to a query is its value."""

    name = "mqar"
    settings_class = Recall

    def validate(self, settings: Recall, problem: Problem) -> None:
        check_size(problem, "vocabulary", settings.vocabulary, 4, 2**20)
        check_size(problem, "pairs", settings.pairs, 1, max(1, settings.vocabulary // 2))
        if not settings.exponent > 0:
            problem("exponent", f"must be positive ({settings.exponent})")

    def vocabulary(self, settings: Recall) -> list[str]:
        return [f"k{key}" for key in range(settings.vocabulary // 2)] + self._values(settings)

    def _values(self, settings: Recall) -> list[str]:
        return [f"v{value}" for value in range(settings.vocabulary - settings.vocabulary // 2)]

    def answers(self, settings: Recall) -> int:
        return len(self._values(settings))

    def shortest(self, settings: Recall) -> int:
        return 4 * settings.pairs

    def example(self, draws: Draws, length: int, settings: Recall) -> Example:
        pairs, values = settings.pairs, self._values(settings)
        keys = [f"k{key}" for key in draws.distinct(settings.vocabulary // 2, pairs)]
        of_key = dict(zip(keys, draws.choices(values, pairs), strict=True))
        words = [word for pair in of_key.items() for word in pair]
        places = (length - 2 * pairs) // 2
        words += draws.choices(values, 2 * places)
        answers: list[str | None] = [None] * len(words)
        weights = np.arange(1, places + 1, dtype=np.float64) ** (settings.exponent - 1)
        # Which key stands where is random too, or the order of the pairs would tell it.
        asked = draws.distinct(pairs, pairs)
        for key, place in zip((keys[number] for number in asked), draws.weighted(weights, pairs), strict=True):
            words[2 * (pairs + place)] = key
            answers[2 * (pairs + place)] = of_key[key]
        return Example(words, answers)

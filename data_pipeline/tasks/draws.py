"""Random numbers of one example: a pure function of what the example is, on every machine and version of NumPy.

NumPy promises the raw bits of its generators to stay as they are, not what its distributions make of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from data_pipeline.ordering.order import derive_key

Item = TypeVar("Item")


class Draws:
    """Draws for what `parts` name, such as the seed, the split and the number of an example."""

    def __init__(self, *parts: int | str):
        self._bits = np.random.Philox(key=derive_key("task", *parts))

    def below(self, limit: int, count: int) -> list[int]:
        """`count` whole numbers in range(limit), each alike likely (to 2**-40 for limits below 2**24)."""
        return (self._bits.random_raw(count) % np.uint64(limit)).tolist()

    def one_below(self, limit: int) -> int:
        """One of them."""
        return self.below(limit, 1)[0]

    def choices(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` of `items`, each alike likely, with repetition."""
        return [items[place] for place in self.below(len(items), count)]

    def distinct(self, limit: int, count: int) -> list[int]:
        """`count` different numbers in range(limit), in random order."""
        return self.weighted(np.ones(limit), count)

    def weighted(self, weights: np.ndarray, count: int) -> list[int]:
        """`count` different places of `weights` [N], drawn one after another by their weights."""
        # The smallest of exponential draws, each divided by its weight (Efraimidis and Spirakis 2006).
        uniform = (self._bits.random_raw(len(weights)) >> np.uint64(11)).astype(np.float64) + 0.5
        waits = -np.log(uniform / 2.0**53) / weights
        return np.argsort(waits, kind="stable")[:count].tolist()

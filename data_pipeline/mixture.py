"""Which source the sample at a position of the run comes from, and which of its samples: a pure function of position.

Two modes. Without weights all sources form one pool, and each pass of `sum(sizes)` samples visits every sample once.
With weights the run is cut into blocks of `BLOCK` samples; every block holds exactly `quota[s]` samples of source s, at
permuted places, and each source goes through its own epochs, one after another, each in a new order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from data_pipeline.order import derive_key, permute

# Samples per block of a weighted mixture: the resolution of the weights.
BLOCK = 4096


def check_weights(weights: Mapping[str, float], sources: Mapping[str, int]) -> list[str]:
    """Problems with `weights` over `sources` (label -> number of samples), one line each."""
    problems = []
    for label, weight in weights.items():
        if label not in sources:
            problems.append(f"weights.{label}: the corpus has no such source; it has {', '.join(sorted(sources))}")
        elif not (math.isfinite(weight) and weight >= 0):
            problems.append(f"weights.{label}: a weight must be a finite number >= 0, not {weight}")
        elif weight > 0 and sources[label] == 0:
            problems.append(
                f"weights.{label}: the source has fewer tokens than one sample; set its weight to 0 or "
                "shorten the sequence length"
            )
    if not problems and not sum(weights.values()) > 0:
        problems.append("weights: at least one weight must be positive")
    if not problems:
        quotas = _largest_remainder(weights, BLOCK)
        problems += [
            f"weights.{label}: {weight} is below the resolution of 1/{2 * BLOCK} of the sum; raise it or set it to 0"
            for label, weight in weights.items()
            if weight > 0 and quotas[label] == 0
        ]
    return problems


def _largest_remainder(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Integers that sum to `total` in proportion to `weights`; ties go to the label that sorts first."""
    scale = total / math.fsum(weights.values())
    exact = {label: weights[label] * scale for label in sorted(weights)}
    quotas = {label: int(value) for label, value in exact.items()}
    by_remainder = sorted(exact, key=lambda label: (quotas[label] - exact[label], label))
    for label in by_remainder[: total - sum(quotas.values())]:
        quotas[label] += 1
    return quotas


class Mixture:
    """The order of all samples of all sources.

    `sizes`: samples of each source. `weights`: share of each source in the samples of the run (any scale; a source
    without one is left out); None: one pool. Raises ValueError with every problem of the weights.
    """

    def __init__(self, sizes: Mapping[str, int], weights: Mapping[str, float] | None, seed: int):
        self.sources = sorted(sizes)
        self.sizes = {label: int(sizes[label]) for label in self.sources}
        self.seed = seed
        self.quotas: dict[str, int] | None = None
        if weights is not None:
            problems = check_weights(weights, self.sizes)
            if problems:
                raise ValueError("; ".join(problems))
            full = {label: float(weights.get(label, 0.0)) for label in self.sources}
            self.quotas = _largest_remainder(full, BLOCK)
        shares = self.sizes if self.quotas is None else self.quotas
        self._bounds = np.cumsum([0, *(shares[label] for label in self.sources)], dtype=np.int64)
        self._block = lru_cache(maxsize=8)(self._compute_block)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of all sources together (of those with a positive weight)."""
        return sum(size for label, size in self.sizes.items() if self.quotas is None or self.quotas[label])

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source number in `.sources`, epoch of that source, sample of that source), int64, for run positions >= 0."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"sample positions start at 0, got {positions.min()}")
        return self._locate_pooled(positions) if self.quotas is None else self._locate_weighted(positions)

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source has been gone through after `samples` samples of the run (mean, not exact)."""
        shares = self.sizes if self.quotas is None else self.quotas
        total = sum(shares.values())
        return {s: samples * shares[s] / total / self.sizes[s] for s in self.sources if self.sizes[s]}

    def _locate_pooled(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        total = int(self._bounds[-1])
        epochs, rest = np.divmod(positions, total)
        keys = _keys(epochs, self.seed, "pool")
        places = permute(rest, total, keys)
        numbers = np.searchsorted(self._bounds, places, side="right") - 1
        return numbers, epochs, places - self._bounds[numbers]

    def _locate_weighted(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        blocks, rest = np.divmod(positions, BLOCK)
        numbers, ranks = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks).tolist():
            mine = blocks == block
            numbers[mine], ranks[mine] = (column[rest[mine]] for column in self._block(block))
        epochs, samples = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            label = self.sources[number]
            mine = np.flatnonzero(numbers == number)
            # How many samples of its source the run takes before this one.
            ordinals = blocks[mine] * self.quotas[label] + ranks[mine]
            epochs[mine], within = np.divmod(ordinals, self.sizes[label])
            keys = _keys(epochs[mine], self.seed, "source", label)
            samples[mine] = permute(within, self.sizes[label], keys)
        return numbers, epochs, samples

    def _compute_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source number, how many of that source come before it in the block) of each place of a block."""
        places = permute(np.arange(BLOCK), BLOCK, derive_key(self.seed, "block", block))
        numbers = np.searchsorted(self._bounds, places, side="right") - 1
        by_source = np.argsort(numbers, kind="stable")
        ranks = np.empty(BLOCK, dtype=np.int64)
        ranks[by_source] = np.arange(BLOCK) - self._bounds[numbers[by_source]]
        return numbers, ranks


def _keys(numbers: np.ndarray, *parts: int | str) -> np.ndarray:
    """The key of (parts, number) for each of `numbers`, uint64 [len(numbers)]."""
    unique, inverse = np.unique(numbers, return_inverse=True)
    keys = np.array([derive_key(*parts, int(number)) for number in unique], dtype=np.uint64)
    return keys[inverse.reshape(numbers.shape)]

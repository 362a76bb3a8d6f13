"""The order for storage that is far away: a permutation that keeps to a few shards at a time.

The shards of a pass are permuted and taken in windows of W; the samples of a window are permuted among themselves. Like
`order.permute` it is a bijection of range(n) for each key and computed for any index, so that everything built on that
stays as it is. What it needs beside the key are prefix sums over the permuted shards, 24 bytes a shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_pipeline.ordering.order import permute

# Part of the identity of a run that uses windows: another version is another order.
WINDOWS_VERSION = 1


@dataclass(frozen=True)
class _Pass:
    """One pass: first sample of each shard in the order of the pass, how many come before it, and before each window.

    All int64; `before` has the total at its end, `windows` too.
    """

    firsts: np.ndarray
    before: np.ndarray
    windows: np.ndarray


class WindowedOrder:
    """Permutations of range(n), n = bounds[-1], in which `window_shards` shards are read at a time.

    `bounds`: int64 [shards + 1], shard s begins samples [bounds[s], bounds[s + 1]); it may begin none. `key_of`: 64-bit
    key from a pass and what it is for.
    """

    def __init__(self, bounds: np.ndarray, window_shards: int, key_of: Callable[..., int]):
        sizes = np.diff(bounds)
        # A shard that begins no sample (it is shorter than one) would make its window smaller.
        self._firsts, self._sizes = bounds[:-1][sizes > 0], sizes[sizes > 0]
        self._window_shards = window_shards
        self._key_of = key_of
        self._pass = lru_cache(maxsize=2)(self._compute_pass)

    def permute(self, indices: np.ndarray, number: int) -> np.ndarray:
        """The sample at each of `indices` (int64, in range(n)) of pass `number`; int64."""
        layout = self._pass(number)
        windows = np.searchsorted(layout.windows, indices, side="right") - 1
        places = np.empty_like(indices)
        for window in np.unique(windows).tolist():
            mine = windows == window
            begin, end = layout.windows[window : window + 2].tolist()
            places[mine] = begin + permute(indices[mine] - begin, end - begin, self._key_of(number, "window", window))
        shards = np.searchsorted(layout.before, places, side="right") - 1
        return layout.firsts[shards] + places - layout.before[shards]

    def _compute_pass(self, number: int) -> _Pass:
        count = len(self._sizes)
        order = permute(np.arange(count), count, self._key_of(number, "shards"))
        before = np.concatenate(([0], np.cumsum(self._sizes[order])))
        windows = np.append(before[: count : self._window_shards], before[-1])
        return _Pass(self._firsts[order], before, windows)

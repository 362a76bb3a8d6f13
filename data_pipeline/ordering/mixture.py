"""Which source the sample at a position of the run comes from, and which of its samples: a pure function of position.

Two modes. Without any setting all sources form one pool, and each pass of `sum(sizes)` samples visits every sample
once. Otherwise the run is cut into segments, in each of which the shares are constant: a segment begins where a phase
begins or where a source has reached its cap. A segment goes in blocks; after every block each source has had its share
of the segment to within one sample (largest remainders of the whole so far, so that rounding never adds up), at
permuted places. Each source goes through its own epochs, one after another, each in a new order.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

import numpy as np

from data_pipeline.ordering.order import derive_key, permute
from data_pipeline.ordering.windows import WindowedOrder

# Part of the identity of a run with a mixture: another version is another order.
MIXTURE_VERSION = 2
# Samples of a block; doubled until every source in use has one in it, up to the largest.
BLOCK = 4096
LARGEST_BLOCK = 2**20
# Shares are integers that sum to this.
_WHOLE_BITS = 40
_WHOLE = 1 << _WHOLE_BITS
# What an order is for: ("pool",) or ("source", label); goes into its keys.
Purpose = tuple[str, ...]


@dataclass(frozen=True)
class Phase:
    """Shares that hold from sample `start` of the run on. `weights` and `temperature` as in MixtureConfig."""

    start: int
    weights: Mapping[str, float] | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class MixtureConfig:
    """How sources are mixed.

    weights: share of each source in the samples (any scale; a source without one is left out); None: by `temperature`.
    temperature: shares in proportion to size ** (1 / temperature): 1 is proportional, large is even. None with no
    weights: proportional, and with nothing else set one pool. epoch_caps: label -> passes after which the source is
    left out and the others share its place. phases: later changes, by their first sample.
    """

    weights: Mapping[str, float] | None = None
    temperature: float | None = None
    epoch_caps: Mapping[str, float] | None = None
    phases: Sequence[Phase] = ()

    @property
    def pooled(self) -> bool:
        return self.weights is None and self.temperature is None and not self.epoch_caps and not self.phases

    @property
    def all_phases(self) -> list[Phase]:
        """The shares from sample 0 on, then the later phases in order."""
        return [Phase(0, self.weights, self.temperature), *sorted(self.phases, key=lambda phase: phase.start)]


def check_mixture(config: MixtureConfig, sources: Mapping[str, int]) -> list[str]:
    """Problems of `config` over `sources` (label -> number of samples), one line each."""
    problems = []
    for label, cap in (config.epoch_caps or {}).items():
        if label not in sources:
            problems.append(f"epoch_caps.{label}: the corpus has no such source; it has {', '.join(sorted(sources))}")
        elif not (math.isfinite(cap) and cap > 0):
            problems.append(f"epoch_caps.{label}: must be a finite number above 0, not {cap}")
    starts = [phase.start for phase in config.phases]
    problems += [f"phases: a phase must start after sample 0, not at {start}" for start in starts if start < 1]
    problems += [f"phases: two start at sample {start}" for start in sorted({s for s in starts if starts.count(s) > 1})]
    for number, phase in enumerate(config.all_phases):
        prefix = "" if number == 0 else f"phases[{number - 1}]."
        if phase.weights is not None and phase.temperature is not None:
            problems.append(f"{prefix}temperature: cannot be combined with weights; set one of the two to null")
        elif phase.temperature is not None and not (math.isfinite(phase.temperature) and phase.temperature > 0):
            problems.append(f"{prefix}temperature: must be a finite number above 0, not {phase.temperature}")
        else:
            problems += _check_weights(phase, sources, prefix)
    return problems


def _check_weights(phase: Phase, sources: Mapping[str, int], prefix: str) -> list[str]:
    problems = []
    for label, weight in (phase.weights or {}).items():
        key = f"{prefix}weights.{label}"
        if label not in sources:
            problems.append(f"{key}: the corpus has no such source; it has {', '.join(sorted(sources))}")
        elif not (math.isfinite(weight) and weight >= 0):
            problems.append(f"{key}: a weight must be a finite number >= 0, not {weight}")
        elif weight > 0 and sources[label] == 0:
            problems.append(
                f"{key}: the source has fewer tokens than one sample; set its weight to 0 or shorten the sequence "
                "length"
            )
    if problems:
        return problems
    try:
        weights = _weights(phase, sources)
        total = math.fsum(weights.values())
    except OverflowError:
        total = math.inf
    if total == math.inf:
        key, value = ("temperature", phase.temperature) if phase.weights is None else ("weights", dict(phase.weights))
        return [f"{prefix}{key}: gives shares that are too large to compute ({value}); take values closer to 1"]
    if not total > 0:
        return [f"{prefix}weights: at least one weight must be positive"]
    return [
        f"{prefix}weights.{label}: {weight:g} is less than one sample in {LARGEST_BLOCK:,}; raise it or set it to 0"
        for label, weight in weights.items()
        if 0 < weight < total / LARGEST_BLOCK
    ]


def _weights(phase: Phase, sizes: Mapping[str, int]) -> dict[str, float]:
    """The weight of every source, sorted by label."""
    if phase.weights is not None:
        return {label: float(phase.weights.get(label, 0.0)) for label in sorted(sizes)}
    exponent = 1 / (phase.temperature or 1.0)
    return {label: float(sizes[label]) ** exponent for label in sorted(sizes)}


def _apportion(shares: Sequence[int], total: int) -> list[int]:
    """Integers that sum to `total` in proportion to `shares`, which sum to _WHOLE; ties go to the first."""
    counts = [share * total >> _WHOLE_BITS for share in shares]
    order = sorted(range(len(shares)), key=lambda s: (-(shares[s] * total & (_WHOLE - 1)), s))
    for number in order[: total - sum(counts)]:
        counts[number] += 1
    return counts


def _shares(weights: Sequence[float]) -> list[int]:
    """`weights` as integers that sum to _WHOLE, by largest remainders."""
    exact = [Fraction(weight) for weight in weights]
    scaled = [weight * _WHOLE / sum(exact) for weight in exact]
    shares = [int(value) for value in scaled]
    order = sorted(range(len(shares)), key=lambda s: (shares[s] - scaled[s], s))
    for number in order[: _WHOLE - sum(shares)]:
        shares[number] += 1
    return shares


@dataclass(frozen=True)
class _Segment:
    """Samples [start, end) of the run, in blocks of `block`. base: samples of each source before it.

    Either `shares` hold throughout, or it is one block with these `quotas`.
    """

    start: int
    end: int | None
    block: int
    base: list[int]
    shares: list[int] | None = None
    quotas: list[int] | None = None

    def counts_before(self, block: int) -> list[int]:
        """Samples of each source in the segment before a block of it."""
        if self.quotas is not None:
            return self.quotas if block else [0] * len(self.quotas)
        assert self.shares is not None
        return _apportion(self.shares, block * self.block)

    def quotas_of(self, block: int) -> list[int]:
        before, after = self.counts_before(block), self.counts_before(block + 1)
        return [b - a for a, b in zip(before, after, strict=True)]


class Mixture:
    """The order of all samples of all sources.

    `sizes`: samples of each source. Raises ValueError with every problem of `config`. `limit`: samples that the run can
    have before every source has reached its cap; None: endless. `shards`: of each source the bounds of its shards, as
    `WindowedOrder` takes them; a pass then keeps to `window_shards` of them at a time. None: permuted as a whole.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        config: MixtureConfig,
        seed: int,
        shards: Mapping[str, np.ndarray] | None = None,
        window_shards: int = 1,
    ):
        self.sources = sorted(sizes)
        self.sizes = {label: int(sizes[label]) for label in self.sources}
        self.seed = seed
        self.limit: int | None = None
        self._pooled = config.pooled
        self._bounds = np.cumsum([0, *self.sizes.values()], dtype=np.int64)
        self._segments: list[_Segment] = []
        if not self._pooled:
            problems = check_mixture(config, self.sizes)
            if problems:
                raise ValueError("; ".join(problems))
            caps = config.epoch_caps or {}
            self._caps = [math.floor(caps[s] * self.sizes[s]) if s in caps else None for s in self.sources]
            self._segments = list(self._cut(config.all_phases))
            if not self._segments:
                raise ValueError(
                    f"epoch_caps: no source has a whole sample below its cap ({dict(caps)} of {self.sizes} samples); "
                    "raise the caps"
                )
            if self._segments[-1].end is not None:
                self.limit = self._segments[-1].end
        self._starts = [segment.start for segment in self._segments]
        self._windowed = None if shards is None else self._windowed_orders(shards, window_shards)
        self._block = lru_cache(maxsize=3)(self._compute_block)

    @property
    def orders(self) -> int:
        """How many permutations the run goes through side by side: that of the pool, or one of each source."""
        return 1 if self._pooled else sum(size > 0 for size in self.sizes.values())

    @property
    def identity(self) -> list[Any]:
        """What the order depends on beside seed and sizes, for a fingerprint."""
        return [MIXTURE_VERSION, [[s.start, s.end, s.block, s.shares, s.quotas] for s in self._segments]]

    @property
    def samples_per_epoch(self) -> int:
        """Samples of all sources together (of those that the first phase uses)."""
        if self._pooled:
            return int(self._bounds[-1])
        first = self._segments[0]
        used = first.shares or first.quotas or []
        return sum(self.sizes[s] for s, share in zip(self.sources, used, strict=True) if share)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source number in `.sources`, epoch of that source, sample of that source), int64, for run positions >= 0."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"sample positions start at 0, got {positions.min()}")
        if self.limit is not None and positions.size and positions.max() >= self.limit:
            raise ValueError(f"every source has reached its cap after {self.limit} samples, before {positions.max()}")
        return self._locate_pooled(positions) if self._pooled else self._locate_mixed(positions)

    def counts(self, samples: int) -> dict[str, int]:
        """How many of the first `samples` samples of a mixed run come from each source, exactly."""
        number = max(0, bisect_right(self._starts, samples) - 1)
        return dict(zip(self.sources, self._counts_at(self._segments[number], samples), strict=True))

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source has been gone through after `samples` samples of the run; of one pool the mean."""
        if self._pooled:
            total = int(self._bounds[-1])
            return {s: samples / total for s in self.sources if self.sizes[s]}
        counts = self.counts(samples if self.limit is None else min(samples, self.limit))
        return {s: counts[s] / self.sizes[s] for s in self.sources if self.sizes[s]}

    def _cut(self, phases: list[Phase]) -> Iterator[_Segment]:
        """The segments of the run, in order; ends early when every source has reached its cap."""
        position, counts = 0, [0] * len(self.sources)
        for phase, following in zip(phases, [*phases[1:], None], strict=True):
            end = following.start if following else None
            weights = list(_weights(phase, self.sizes).values())
            while end is None or position < end:
                left = [None if cap is None else cap - n for cap, n in zip(self._caps, counts, strict=True)]
                active = [0.0 if room == 0 else weight for weight, room in zip(weights, left, strict=True)]
                if not any(active):
                    return
                segment = self._segment(position, end, _shares(active), counts, left)
                yield segment
                if segment.end is None:
                    return
                position, counts = segment.end, self._counts_at(segment, segment.end)

    def _segment(
        self, position: int, end: int | None, shares: list[int], counts: list[int], left: list[int | None]
    ) -> _Segment:
        """The longest segment from `position` on in which no source exceeds what its cap has `left`."""
        block = BLOCK
        while block < LARGEST_BLOCK and any(0 < share * block < _WHOLE for share in shares):
            block *= 2
        rooms = [(s, room) for s, room in enumerate(left) if room is not None and shares[s]]
        if not rooms:
            return _Segment(position, end, block, counts, shares)
        while True:
            blocks = _blocks_within(shares, block, rooms)
            if end is not None and blocks * block >= end - position:
                return _Segment(position, end, block, counts, shares)
            if blocks:
                return _Segment(position, position + blocks * block, block, counts, shares)
            # Near a cap in smaller blocks, so that the shares hold until the source runs out.
            if any(0 < share * (block // 2) < _WHOLE for share in shares):
                break
            block //= 2
        quotas = _limited_quotas(shares, block, left)
        length = sum(quotas)
        return _Segment(
            position, position + length if end is None else min(end, position + length), block, counts, None, quotas
        )

    def _counts_at(self, segment: _Segment, samples: int) -> list[int]:
        number, rest = divmod(samples - segment.start, segment.block)
        counts = [a + b for a, b in zip(segment.base, segment.counts_before(number), strict=True)]
        if rest:
            sources, _ = self._compute_block(segment, number)
            counts = (np.array(counts) + np.bincount(sources[:rest], minlength=len(counts))).tolist()
        return counts

    def _locate_pooled(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        total = int(self._bounds[-1])
        epochs, rest = np.divmod(positions, total)
        places = self._permute(rest, total, epochs, "pool")
        numbers = np.searchsorted(self._bounds, places, side="right") - 1
        return numbers, epochs, places - self._bounds[numbers]

    def _locate_mixed(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        numbers, ordinals = np.empty_like(positions), np.empty_like(positions)
        segments = np.searchsorted(self._starts, positions, side="right") - 1
        for place in np.unique(segments).tolist():
            segment = self._segments[place]
            inside = np.flatnonzero(segments == place)
            blocks, rest = np.divmod(positions[inside] - segment.start, segment.block)
            for block in np.unique(blocks).tolist():
                mine = inside[blocks == block]
                numbers[mine], ordinals[mine] = (column[rest[blocks == block]] for column in self._block(place, block))
        epochs, samples = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            label = self.sources[number]
            mine = np.flatnonzero(numbers == number)
            epochs[mine], within = np.divmod(ordinals[mine], self.sizes[label])
            samples[mine] = self._permute(within, self.sizes[label], epochs[mine], "source", label)
        return numbers, epochs, samples

    def _windowed_orders(self, shards: Mapping[str, np.ndarray], window_shards: int) -> dict[Purpose, WindowedOrder]:
        """The windowed order of what is permuted as one: the pool, or each source."""
        bounds: dict[Purpose, np.ndarray]
        if self._pooled:
            pool = zip(self._bounds[:-1].tolist(), self.sources, strict=True)
            bounds = {("pool",): np.concatenate([[0], *(begin + shards[label][1:] for begin, label in pool)])}
        else:
            bounds = {("source", label): shards[label] for label in self.sources if self.sizes[label]}
        return {
            purpose: WindowedOrder(places, window_shards, partial(derive_key, self.seed, *purpose))
            for purpose, places in bounds.items()
        }

    def _permute(self, indices: np.ndarray, n: int, epochs: np.ndarray, *purpose: str) -> np.ndarray:
        """The sample at each of `indices` in range(n), each in the order of its epoch; int64."""
        if self._windowed is None:
            return permute(indices, n, _keys(epochs, self.seed, *purpose))
        samples = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            samples[mine] = self._windowed[purpose].permute(indices[mine], epoch)
        return samples

    def _compute_block(self, segment: _Segment | int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source number, how many of that source the run takes before it) of each place of a block."""
        segment = self._segments[segment] if isinstance(segment, int) else segment
        quotas = segment.quotas_of(block)
        size = sum(quotas)
        bounds = np.cumsum([0, *quotas], dtype=np.int64)
        places = permute(np.arange(size), size, derive_key(self.seed, "block", segment.start, block))
        numbers = np.searchsorted(bounds, places, side="right") - 1
        # Counted in the order of the run, so that a phase may begin inside a block.
        by_source = np.argsort(numbers, kind="stable")
        before = np.add(segment.base, segment.counts_before(block))
        ordinals = np.empty(size, dtype=np.int64)
        ordinals[by_source] = np.arange(size) - bounds[numbers[by_source]] + before[numbers[by_source]]
        return numbers, ordinals


def _blocks_within(shares: list[int], block: int, rooms: list[tuple[int, int]]) -> int:
    """How many blocks the sources can take part in: (number of a source, samples that its cap leaves) in `rooms`."""
    # One more than what its own share of a source allows does not fit.
    low, high = 0, min(room * _WHOLE // shares[s] for s, room in rooms) // block + 2
    while high - low > 1:
        middle = (low + high) // 2
        taken = _apportion(shares, middle * block)
        low, high = (middle, high) if all(taken[s] <= room for s, room in rooms) else (low, middle)
    return low


def _limited_quotas(shares: list[int], total: int, left: list[int | None]) -> list[int]:
    """Quotas of a block in which sources reach their caps: what they lack goes to the others by their shares."""
    quotas, open_shares, missing = [0] * len(shares), list(shares), total
    while missing and any(open_shares):
        more = _apportion(_shares([float(share) for share in open_shares]), missing)
        for s, count in enumerate(more):
            allowed = left[s]
            room = count if allowed is None else min(count, allowed - quotas[s])
            quotas[s] += room
            if room < count:
                open_shares[s] = 0
        missing = total - sum(quotas)
    return quotas


def _keys(numbers: np.ndarray, *parts: int | str) -> np.ndarray:
    """The key of (parts, number) for each of `numbers`, uint64 [len(numbers)]."""
    unique, inverse = np.unique(numbers, return_inverse=True)
    keys = np.array([derive_key(*parts, int(number)) for number in unique], dtype=np.uint64)
    return keys[inverse.reshape(numbers.shape)]

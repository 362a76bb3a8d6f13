"""A batch, and how it is put together from ranges of tokens. Axes: B batch (samples), S sequence, W its slice."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from conf.problems import choice
from data_pipeline.corpus.token_sequence import TokenSequence
from data_pipeline.errors import CorpusError, ReadingError
from data_pipeline.ordering.packing import PackingPlan

MASKED = -100
ON_CORRUPT = ("fail", "skip")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Packed samples on the CPU, or the columns of them that one sequence rank holds.

    tokens: int64 [B, W]. targets: int64 [B, W], the next token, MASKED (-100) where there is none to predict.
    document_start: bool [B, W], True where a recurrent state must start empty: at the end-of-document id that opens the
    next document, and at the first token of a source. sources: label of each sample, [B]. continues: bool [B], True
    where the state of the row's last batch carries on (lanes); None: nowhere.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    document_start: torch.Tensor
    sources: list[str]
    continues: torch.Tensor | None = None

    def scored_targets(self) -> int:
        """How many targets are not MASKED."""
        return int((self.targets != MASKED).sum())

    def rows(self, begin: int, end: int) -> Batch:
        """Samples begin ... end - 1, without a copy."""
        continues = None if self.continues is None else self.continues[begin:end]
        tokens, targets, starts = (t[begin:end] for t in (self.tokens, self.targets, self.document_start))
        return Batch(tokens, targets, starts, self.sources[begin:end], continues)


@dataclass(frozen=True)
class Columns:
    """Places [begin, end) of every sample: what one rank of a sequence-parallel group holds."""

    begin: int
    end: int

    @staticmethod
    def of_rank(sequence_length: int, rank: int, ranks: int) -> Columns:
        """The equal share of sequence rank `rank` of `ranks`. Raises ValueError when the length does not divide."""
        if ranks < 1 or not 0 <= rank < ranks or sequence_length % ranks:
            raise ValueError(
                f"training.sequence_length: {sequence_length} does not divide into slices for {ranks} sequence ranks "
                f"(rank {rank})"
            )
        width = sequence_length // ranks
        return Columns(rank * width, (rank + 1) * width)


def sample_numbers(first_sample: int | Sequence[int] | np.ndarray, count: int | None) -> np.ndarray:
    """int64 [B]: first_sample ... first_sample + count - 1; without a count, `first_sample` is the numbers."""
    if count is None:
        return np.asarray(first_sample, dtype=np.int64).reshape(-1)
    if not isinstance(first_sample, (int, np.integer)):
        raise ValueError(f"with a count ({count}) the first sample is one number, not {first_sample!r}")
    return np.arange(first_sample, first_sample + count, dtype=np.int64)


@dataclass(frozen=True)
class Damage:
    """What is wrong with a shard, and the number of the first sample that was seen to touch it."""

    problem: str
    sample: int


class DamagedSamples:
    """What becomes of samples that touch a damaged shard: the run fails, or they are masked, counted and logged.

    A masked sample has no target; no other sample moves, so that the order is the same for all ranks and on resume.
    Safe to use from threads.
    """

    def __init__(self, on_corrupt: str):
        if problems := choice("on_corrupt", on_corrupt, ON_CORRUPT):
            raise ValueError(*problems)
        self.skip = on_corrupt == "skip"
        self.skipped = 0
        self._found: dict[str, Damage] = {}
        self._reported: set[str] = set()
        self._lock = threading.Lock()

    @property
    def problems(self) -> list[str]:
        """What is wrong with the shards concerned, one line for each that this process has met."""
        return list(self._found)

    def unreported(self) -> list[Damage]:
        """Damage that this process has met and `mark_reported` does not know."""
        with self._lock:
            return [damage for problem, damage in self._found.items() if problem not in self._reported]

    def mark_reported(self, problems: Iterable[str]) -> None:
        """Leave these out of `unreported`, also where this process meets them later."""
        with self._lock:
            self._reported.update(problems)

    def handler(
        self, damaged: set[int], rows: np.ndarray, samples: np.ndarray
    ) -> Callable[[int, CorpusError], None] | None:
        """For `TokenSequence.fetch`: adds rows[range] to `damaged`; `samples`: number of each row's sample.

        None: errors are raised.
        """
        if not self.skip:
            return None

        def on_error(number: int, error: CorpusError) -> None:
            if isinstance(error, ReadingError):
                raise error
            row, problem = int(rows[number]), str(error)
            damaged.add(row)
            with self._lock:
                known = problem in self._found
                self._found.setdefault(problem, Damage(problem, int(samples[row])))
            if not known:
                _LOG.error("samples are skipped: %s", error)

        return on_error

    def count(self, samples: int) -> None:
        """Add to `skipped`."""
        with self._lock:
            self.skipped += samples


class Assembly:
    """Empty arrays for one batch; filled source by source, then made into a `Batch`.

    `samples`: number of each row's sample, int64 [B]. `pin`: page-locked memory, for transfers that run beside the
    computation.
    """

    def __init__(self, samples: np.ndarray, columns: Columns, eod_id: int, damage: DamagedSamples, pin: bool = False):
        self._samples = samples
        self._columns = columns
        self._width = columns.end - columns.begin
        self._eod_id = eod_id
        self._damage = damage
        self._damaged: set[int] = set()
        shape = (len(samples), self._width)
        # Filled through NumPy: torch's own fill and copy wake its thread pool, which the training step uses.
        kinds = (torch.int64, torch.int64, torch.bool)
        self.tokens, self.targets, self.starts = (torch.empty(shape, dtype=kind, pin_memory=pin) for kind in kinds)

    def add_windows(
        self, sequence: TokenSequence, dtype: np.dtype, rows: np.ndarray, begins: np.ndarray, valid: np.ndarray
    ) -> None:
        """Rows of consecutive tokens: inputs from `begins` on, `valid` targets each, the rest padding; int64 [n]."""
        begin, width = self._columns.begin, self._width
        # One token more than a row has inputs, in the narrow type of the shards: each token is fetched once.
        fetched = np.empty((len(rows), width + 1), dtype=dtype)
        starts = np.zeros((len(rows), width + 1), dtype=bool)
        counts = np.minimum(np.maximum(valid - begin, -1), width) + 1
        wanted = np.flatnonzero(counts > 1)
        on_error = self._damage.handler(self._damaged, rows[wanted], self._samples)
        if on_error and width < int(valid.max()):
            # All ranks that hold a part of a damaged sample skip it.
            sequence.check(begins[wanted], valid[wanted] + 1, on_error)
        sequence.fetch(
            wanted * (width + 1),
            begins[wanted] + begin,
            counts[wanted],
            fetched.reshape(-1),
            starts.reshape(-1),
            on_error,
        )
        every = len(rows) == len(self.tokens)
        target = slice(None) if every else rows
        _copy(self.tokens, target, fetched[:, :-1])
        _copy(self.targets, target, fetched[:, 1:])
        _copy(self.starts, target, starts[:, :-1])
        for place in np.flatnonzero(counts <= width).tolist():
            self._pad(int(rows[place]), max(0, int(counts[place]) - 1))

    def _pad(self, row: int, place: int) -> None:
        self.tokens.numpy()[row, place:] = self._eod_id
        self.targets.numpy()[row, place:] = MASKED
        self.starts.numpy()[row, place:] = False

    def add_packed(
        self,
        sequence: TokenSequence,
        dtype: np.dtype,
        rows: np.ndarray,
        plan: PackingPlan,
        source: str,
        samples: np.ndarray,
    ) -> None:
        """Rows of whole documents and of parts of long ones, as `plan` packs them; int64 [n]."""
        row, place, begin, count, opens = plan.pieces(source, samples)
        lengths = np.bincount(row, count, len(rows)).astype(np.int64) - self._columns.begin
        on_error = self._damage.handler(self._damaged, rows[row], self._samples)
        if on_error:
            # With the token before a piece that goes on with a document, which is its first input.
            sequence.check(begin - ~opens, count + ~opens, on_error)
        low, high = np.maximum(place, self._columns.begin), np.minimum(place + count, self._columns.end)
        inside = high > low
        row, begin, low, high, cut, opens = (
            x[inside] for x in (row, begin + low - place, low, high, low > place, opens)
        )
        at = row * self._width + low - self._columns.begin
        # Where a piece goes on with a document, its first input is the token before it, fetched behind the rows.
        before = np.flatnonzero(cut | ~opens)
        size = len(rows) * self._width
        fetched = np.empty(size + len(before), dtype=dtype)
        places = np.concatenate((at, size + np.arange(len(before))))
        begins = np.concatenate((begin, begin[before] - 1))
        counts = np.concatenate((high - low, np.ones(len(before), np.int64)))
        on_error = self._damage.handler(self._damaged, rows[np.concatenate((row, row[before]))], self._samples)
        sequence.fetch(places, begins, counts, fetched, None, on_error)
        filled = np.zeros(size, dtype=bool)
        filled[_ranges(at, high - low)] = True
        targets = np.where(filled, fetched[:size].astype(np.int64), MASKED)
        tokens = np.full(size, self._eod_id, dtype=np.int64)
        tokens[1:] = np.where(filled[:-1], fetched[: size - 1], self._eod_id)
        tokens[at] = self._eod_id
        tokens[at[before]] = fetched[size:]
        starts = np.zeros(size, dtype=bool)
        starts[at[~cut]] = True
        # Padding starts anew, once: no document reaches into it.
        padded = np.flatnonzero((lengths >= 0) & (lengths < self._width))
        starts[padded * self._width + lengths[padded]] = True
        tokens[~filled] = self._eod_id
        shape = (len(rows), self._width)
        for tensor, array in ((self.tokens, tokens), (self.targets, targets), (self.starts, starts)):
            _copy(tensor, rows, array.reshape(shape))

    def finish(self, sources: list[str], continues: np.ndarray | None = None) -> Batch:
        """The batch; damaged samples become padding."""
        for row in self._damaged:
            self._pad(row, 0)
        self._damage.count(len(self._damaged))
        tensor = None if continues is None else torch.from_numpy(continues)
        return Batch(self.tokens, self.targets, self.starts, sources, tensor)


def _copy(tensor: torch.Tensor, rows: np.ndarray | slice, array: np.ndarray) -> None:
    tensor.numpy()[rows] = array


def _ranges(begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """begins[0], begins[0] + 1, ..., then those of the next range, int64."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(begins - (ends - counts), counts)

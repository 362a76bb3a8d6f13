"""Batches of packed samples from a corpus. Axes: B batch (samples), S sequence.

Sample k of a source is tokens [k * S, k * S + S] of it: S inputs and, one further, S targets. Which sample is number i
of the run is a pure function of (corpus, split, sequence length, seed, weights, i), see `mixture.py`; so the whole
state of reading is one integer, and ranks, workers and restarts do not change the order.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch

from data_pipeline.corpus import Corpus, TokenSequence
from data_pipeline.errors import CorpusError
from data_pipeline.manifest import canonical_json
from data_pipeline.mixture import Mixture
from data_pipeline.order import ORDER_VERSION
from data_pipeline.shards import token_dtype

__all__ = ["Batch", "Corpus", "CorpusError", "SampleStream", "StepLoader", "WindowStream", "sequential_batches"]

MASKED = -100
# Neighbouring samples whose places are computed in one go: the cost of a call is that of a thousand.
LOCATED_TOGETHER = 1024


@dataclass(frozen=True)
class Batch:
    """Packed samples on the CPU.

    tokens: int64 [B, S]. targets: int64 [B, S], the next token, MASKED (-100) where there is none to predict.
    document_start: bool [B, S], True where a recurrent state must start empty: at the end-of-document id that opens the
    next document, and at the first token of a source. sources: label of each sample, [B].
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    document_start: torch.Tensor
    sources: list[str]


@dataclass(frozen=True)
class SampleOrigin:
    """Where a sample of the run comes from. `parts`: (shard file, first token, end) within each shard."""

    index: int
    source: str
    epoch: int
    sample: int
    parts: list[tuple[str, int, int]]


def _check_length(sequence_length: int) -> None:
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be at least 1, got {sequence_length}")


class SampleStream:
    """The endless, seeded order of the samples of one split.

    `weights`: share of each source in the samples; None: all samples of all sources, each once an epoch. Raises
    CorpusError when the split is missing or shorter than one sample, ValueError for weights that cannot be used.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        sequence_length: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ):
        _check_length(sequence_length)
        self.corpus = corpus
        self.split = split
        self.sequence_length = sequence_length
        self.seed = seed
        sizes = {
            source: max(0, (corpus.tokens(split, source) - 1) // sequence_length) for source in corpus.sources(split)
        }
        if not any(sizes.values()):
            raise CorpusError(
                f"{corpus.directory}: split '{split}' has {corpus.tokens(split)} tokens, less than one sample of "
                f"{sequence_length} + 1; use a shorter sequence length or more text"
            )
        self.mixture = Mixture(sizes, weights, seed)
        self._sequences = [corpus.sequence(split, source) for source in self.mixture.sources]
        self._locate_run = lru_cache(maxsize=8)(self._compute_run)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of all sources in use; without weights, that many in a row visit each sample exactly once."""
        return self.mixture.samples_per_epoch

    @property
    def fingerprint(self) -> str:
        """Identity of the order (hex sha256): equal fingerprints mean that sample i is the same for every i."""
        identity = [self.corpus.fingerprint, ORDER_VERSION, self.split, self.sequence_length, self.seed]
        return hashlib.sha256(canonical_json([*identity, self.mixture.quotas]).encode()).hexdigest()

    def batch(self, first_sample: int | Sequence[int] | np.ndarray, count: int | None = None) -> Batch:
        """Samples first_sample ... first_sample + count - 1 of the run; or those of a sequence of indices."""
        if count is not None:
            indices = np.arange(first_sample, first_sample + count, dtype=np.int64)
        else:
            indices = np.asarray(first_sample, dtype=np.int64).reshape(-1)
        numbers, samples = self._locate(indices)
        length = self.sequence_length
        windows = [
            (self._sequences[number], sample * length, length)
            for number, sample in zip(numbers.tolist(), samples.tolist(), strict=True)
        ]
        return _pack(self.corpus, windows, length, [self.mixture.sources[number] for number in numbers])

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source number, sample of that source) of each index, computed for runs of neighbours at once."""
        runs, places = np.divmod(indices, LOCATED_TOGETHER)
        found = np.empty((2, len(indices)), dtype=np.int64)
        for run in np.unique(runs).tolist():
            mine = runs == run
            found[:, mine] = self._locate_run(run)[:, places[mine]]
        return found[0], found[1]

    def _compute_run(self, run: int) -> np.ndarray:
        positions = np.arange(run * LOCATED_TOGETHER, (run + 1) * LOCATED_TOGETHER, dtype=np.int64)
        numbers, _, samples = self.mixture.locate(positions)
        return np.stack([numbers, samples])

    def origin(self, index: int) -> SampleOrigin:
        """Where sample `index` of the run comes from, to trace a loss spike back to text."""
        number, epoch, sample = (int(x[0]) for x in self.mixture.locate(np.array([index])))
        sequence = self._sequences[number]
        start = sample * self.sequence_length
        spans = sequence.parts(start, start + self.sequence_length + 1)
        parts = [(sequence.entries[n].file, first, end) for n, first, end in spans]
        return SampleOrigin(index, self.mixture.sources[number], epoch, sample, parts)


class WindowStream:
    """Every token of a split once, in order, for evaluation: windows of S inputs, source after source.

    The windows of a source cover its targets without overlap; the last one is filled up with the end-of-document id,
    its targets there being MASKED. `source`: only this one. Raises CorpusError when there is nothing to predict.
    """

    def __init__(self, corpus: Corpus, split: str, sequence_length: int, source: str | None = None):
        _check_length(sequence_length)
        self.corpus = corpus
        self.sequence_length = sequence_length
        self._labels = [source] if source else corpus.sources(split)
        self._sequences = [corpus.sequence(split, label) for label in self._labels]
        # A window with at least one target; -(-a // b) rounds up.
        counts = [-(-(sequence.tokens - 1) // sequence_length) for sequence in self._sequences]
        self._bounds = list(accumulate(counts, initial=0))
        self.windows = self._bounds[-1]
        self.targets = sum(sequence.tokens - 1 for sequence in self._sequences)
        if not self.windows:
            raise CorpusError(f"{corpus.directory}: split '{split}' has no token to predict; hold out more text")

    def batch(self, first_window: int, count: int) -> Batch:
        """Windows first_window ... first_window + count - 1, fewer at the end."""
        length = self.sequence_length
        windows, sources = [], []
        for window in range(first_window, min(first_window + count, self.windows)):
            number = bisect_right(self._bounds, window) - 1
            sequence = self._sequences[number]
            begin = (window - self._bounds[number]) * length
            windows.append((sequence, begin, min(length, sequence.tokens - 1 - begin)))
            sources.append(self._labels[number])
        return _pack(self.corpus, windows, length, sources)


def sequential_batches(
    corpus: Corpus, split: str, sequence_length: int, batch_size: int, source: str | None = None
) -> Iterator[Batch]:
    """Every token of the split (or of one source of it) once, in order; the last batch may hold fewer windows."""
    windows = WindowStream(corpus, split, sequence_length, source)
    for first in range(0, windows.windows, batch_size):
        yield windows.batch(first, batch_size)


def _pack(corpus: Corpus, windows: list[tuple[TokenSequence, int, int]], length: int, sources: list[str]) -> Batch:
    """The batch of `windows`: (sequence, first input, number of valid targets) each."""
    # One token more than a row has inputs, in the narrow type of the shards: each token is fetched once.
    shape = (len(windows), length + 1)
    fetched = np.empty(shape, dtype=token_dtype(corpus.vocab_size))
    starts = np.zeros(shape, dtype=bool)
    for row, (sequence, begin, valid) in enumerate(windows):
        sequence.read(begin, fetched[row, : valid + 1], starts[row, : valid + 1])
    tokens = fetched[:, :-1].astype(np.int64, order="C")
    targets = fetched[:, 1:].astype(np.int64, order="C")
    starts = np.ascontiguousarray(starts[:, :-1])
    for row, (_, _, valid) in enumerate(windows):
        if valid < length:
            tokens[row, valid:] = corpus.eod_id
            targets[row, valid:] = MASKED
            starts[row, valid:] = False
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(starts), sources)


class StepLoader:
    """The micro-batches of one replica, optimizer step after optimizer step, read ahead by a thread.

    Step t takes samples [first_sample + t * global_batch_size, ...) of the run; replica r of R the r-th contiguous part
    of it, cut into micro-batches. Each item is the list of micro-batches of one step. An error of the thread is raised
    from `next`. `consumed_samples` counts the samples of the whole run up to the last step handed out. Close it (or use
    it as a context manager) to end the thread.
    """

    def __init__(
        self,
        stream: SampleStream,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        replica: int,
        replicas: int,
        first_sample: int,
        prefetch_steps: int = 2,
    ):
        if global_batch_size < 1 or micro_batch_size < 1 or global_batch_size % (replicas * micro_batch_size):
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of replicas {replicas} x micro_batch_size "
                f"{micro_batch_size}; change one of them"
            )
        if not 0 <= replica < replicas or first_sample < 0 or prefetch_steps < 1:
            raise ValueError(
                f"need 0 <= replica < replicas, first_sample >= 0 and prefetch_steps >= 1, got {replica}, {replicas}, "
                f"{first_sample}, {prefetch_steps}"
            )
        self.consumed_samples = first_sample
        self._stream = stream
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._share = global_batch_size // replicas
        self._offset = replica * self._share
        self._queue: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=prefetch_steps)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(first_sample,), name="step-loader", daemon=True)
        self._thread.start()

    def _work(self, first_sample: int) -> None:
        try:
            while not self._stop.is_set():
                self._put(self._load(first_sample + self._offset))
                first_sample += self._global_batch_size
        except BaseException as error:
            self._put(error)

    def _load(self, first: int) -> list[Batch]:
        size = self._micro_batch_size
        share = self._stream.batch(first, self._share)
        return [
            Batch(
                share.tokens[begin : begin + size],
                share.targets[begin : begin + size],
                share.document_start[begin : begin + size],
                share.sources[begin : begin + size],
            )
            for begin in range(0, self._share, size)
        ]

    def _put(self, item: list[Batch] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def __iter__(self) -> StepLoader:
        return self

    def __next__(self) -> list[Batch]:
        if self._failure is not None:
            raise self._failure
        if self._stop.is_set():
            raise RuntimeError("StepLoader is closed")
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        self.consumed_samples += self._global_batch_size
        return item

    def close(self) -> None:
        """End the thread; may be called more than once."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

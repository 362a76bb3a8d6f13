"""Samples of a run from a corpus. Axes: B batch (samples), S sequence.

Concatenated, sample k of a source is tokens [k * S, k * S + S] of it: S inputs and, one further, S targets; packed by
best fit, it is what `packing.py` plans. Which sample is number i of the run is a pure function of (corpus, split,
sequence length, seed, mixture, packing, i), see `mixture.py`; so the whole state of reading is one integer, and ranks,
workers and restarts do not change the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from conf.problems import choice
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.manifest import FORMAT_VERSION, fingerprint_of
from data_pipeline.errors import CorpusError
from data_pipeline.ordering.config import PACKINGS
from data_pipeline.ordering.mixture import Mixture, MixtureConfig
from data_pipeline.ordering.order import ORDER_VERSION
from data_pipeline.ordering.packing import open_packing_plan
from data_pipeline.ordering.windows import WINDOWS_VERSION
from data_pipeline.reading.batch import Assembly, Batch, Columns, DamagedSamples, sample_numbers

# Neighbouring samples whose places are computed in one go: the cost of a call is that of a thousand.
LOCATED_TOGETHER = 1024


@dataclass(frozen=True)
class SampleOrigin:
    """Where a sample of the run comes from. `parts`: (shard file, first token, end) within each shard."""

    index: int
    source: str
    epoch: int
    sample: int
    parts: list[tuple[str, int, int]]


@dataclass(frozen=True)
class Lanes:
    """Consecutive samples for training that carries state from one batch to the next.

    Each source is cut into segments of `windows` consecutive samples. Sample i of the run is in lane i % count, which
    is the global batch size; a lane reads a segment to its end, then another. So row l of a step goes on where row l of
    the step before ended, except where a segment begins, and there `document_start` is set.
    """

    count: int
    windows: int


def _check_length(sequence_length: int) -> None:
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be at least 1, got {sequence_length}")


class SampleStream:
    """The endless, seeded order of the samples of one split.

        stream = SampleStream(corpus, "train", sequence_length=256, seed=0)
        batch = stream.batch(0, 8)  # samples 0 to 7: batch.tokens, batch.targets int64 [8, 256], .document_start bool
        print(stream.origin(5))  # source, epoch, shard and token range of sample 5

    `mixture`: shares of the sources; None: all samples of all sources, each once a pass. `packing`: "concatenate" or
    "best_fit" (its plan is kept in `packing_directory`). `lanes`: for training that carries state. `on_corrupt`:
    "fail", or "skip" to mask samples that touch a damaged shard. `window_shards`: read so many shards at a time
    (`ordering/windows.py`); None: all. `pin`: batches in page-locked memory. Raises CorpusError when the split is
    missing or shorter than one sample, ValueError for settings that cannot be used.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        sequence_length: int,
        seed: int,
        mixture: MixtureConfig | None = None,
        *,
        packing: str = "concatenate",
        packing_directory: Path | None = None,
        lanes: Lanes | None = None,
        window_shards: int | None = None,
        on_corrupt: str = "fail",
        pin: bool = False,
    ):
        _check_length(sequence_length)
        if problems := choice("packing", packing, PACKINGS):
            raise ValueError(*problems)
        if lanes and (packing != "concatenate" or lanes.count < 1 or lanes.windows < 1):
            raise ValueError(f"lanes need packing=concatenate and positive numbers, got {packing} and {lanes}")
        if window_shards is not None and (window_shards < 1 or packing != "concatenate"):
            raise ValueError(
                f"window_shards: needs at least 1 shard and packing=concatenate, whose samples lie in the order of the "
                f"shards, got {window_shards} and {packing}"
            )
        self.corpus = corpus
        self.split = split
        self.sequence_length = sequence_length
        self.seed = seed
        self.window_shards = window_shards
        self.damage = DamagedSamples(on_corrupt)
        self.packing_plan = None
        self._lanes = lanes
        self._pin = pin
        self._dtype = np.dtype(corpus.manifest.token_dtype)
        sources = corpus.sources(split)
        if packing == "best_fit":
            self.packing_plan = open_packing_plan(corpus, split, sequence_length, packing_directory)
            sizes = {source: self.packing_plan.samples(source) for source in sources}
        else:
            span = sequence_length * (lanes.windows if lanes else 1)
            sizes = {source: max(0, (corpus.tokens(split, source) - 1) // span) for source in sources}
        if not any(sizes.values()):
            longest = max(corpus.tokens(split, source) for source in sources)
            needed = (
                f"a segment of {lanes.windows} x {sequence_length}" if lanes else f"one sample of {sequence_length}"
            )
            raise CorpusError(
                f"{corpus.directory}: no source of split '{split}' has more than {longest} tokens, less than {needed} "
                "+ 1; use a shorter sequence length or more text"
            )
        shards = None
        if window_shards is not None:
            shards = {s: corpus.sequence(split, s).first_samples(span, sizes[s]) for s in sources}
        self.mixture = Mixture(sizes, mixture or MixtureConfig(), seed, shards, window_shards or 1)
        self._sequences = [corpus.sequence(split, source) for source in self.mixture.sources]
        self._locate_run = lru_cache(maxsize=8)(self._compute_run)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of all sources in use; without a mixture, that many in a row visit each sample exactly once."""
        return self.mixture.samples_per_epoch * (self._lanes.windows if self._lanes else 1)

    @property
    def sizes(self) -> dict[str, int]:
        """Samples of one pass over each source, by its label."""
        windows = self._lanes.windows if self._lanes else 1
        return {source: size * windows for source, size in self.mixture.sizes.items()}

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source has been gone through after `samples` samples of the run; of one pool the mean."""
        if self._lanes is None:
            return self.mixture.epochs(samples)
        # The mixture counts segments, one of each lane in a turn.
        turns, rest = divmod(samples, self._lanes.count * self._lanes.windows)
        before, after = (self.mixture.epochs(n * self._lanes.count) for n in (turns, turns + 1))
        share = rest / (self._lanes.count * self._lanes.windows)
        return {source: before[source] + share * (after[source] - before[source]) for source in before}

    @property
    def limit(self) -> int | None:
        """Samples until every source has reached its cap; None: endless."""
        if self._lanes is None or self.mixture.limit is None:
            return self.mixture.limit
        return self.mixture.limit // self._lanes.count * self._lanes.count * self._lanes.windows

    @property
    def identity(self) -> dict[str, object]:
        """What the order depends on, by name: equal identities mean that sample i is the same for every i."""
        return {
            "corpus": self.corpus.fingerprint,
            "tokenizer": self.corpus.manifest.tokenizer.fingerprint,
            "format_version": FORMAT_VERSION,
            "order_version": ORDER_VERSION,
            "split": self.split,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "mixture": self.mixture.identity,
            "packing": self.packing_plan.fingerprint if self.packing_plan else "concatenate",
            "lanes": [self._lanes.count, self._lanes.windows] if self._lanes else None,
            "window_shards": None if self.window_shards is None else [WINDOWS_VERSION, self.window_shards],
        }

    @property
    def fingerprint(self) -> str:
        """Identity of the order (hex sha256)."""
        # Without windows as it was before there were any: those checkpoints count the same samples.
        identity = {key: value for key, value in self.identity.items() if (key, value) != ("window_shards", None)}
        return fingerprint_of(identity)

    def batch(
        self,
        first_sample: int | Sequence[int] | np.ndarray,
        count: int | None = None,
        columns: Columns | None = None,
    ) -> Batch:
        """Samples first_sample ... first_sample + count - 1 of the run; or those of a sequence of indices.

        `columns`: only these places of each sample; nothing else is read.
        """
        indices = sample_numbers(first_sample, count)
        numbers, samples = self._locate(indices)
        columns = columns or Columns(0, self.sequence_length)
        assembly = Assembly(indices, columns, self.corpus.eod_id, self.damage, self._pin)
        for number in np.unique(numbers).tolist():
            rows = np.flatnonzero(numbers == number)
            sequence = self._sequences[number]
            if self.packing_plan:
                source = self.mixture.sources[number]
                assembly.add_packed(sequence, self._dtype, rows, self.packing_plan, source, samples[rows])
            else:
                valid = np.full(len(rows), self.sequence_length)
                assembly.add_windows(sequence, self._dtype, rows, samples[rows] * self.sequence_length, valid)
        continues = None
        if self._lanes:
            continues = indices // self._lanes.count % self._lanes.windows > 0
            if columns.begin == 0:
                assembly.starts.numpy()[~continues, 0] = True
        return assembly.finish([self.mixture.sources[number] for number in numbers.tolist()], continues)

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source number, sample of that source) of each index, computed for runs of neighbours at once."""
        if self.limit is not None and indices.size and indices.max() >= self.limit:
            raise ValueError(
                f"epoch_caps: every source has reached its cap after {self.limit} samples; sample {indices.max()} does "
                "not exist. Raise the caps or shorten the run"
            )
        runs, places = np.divmod(indices, LOCATED_TOGETHER)
        found = np.empty((2, len(indices)), dtype=np.int64)
        for run in np.unique(runs).tolist():
            mine = runs == run
            found[:, mine] = self._locate_run(run)[:, places[mine]]
        return found[0], found[1]

    def _compute_run(self, run: int) -> np.ndarray:
        end = (run + 1) * LOCATED_TOGETHER
        if self.limit is not None:
            # What lies beyond the last sample is refused when it is asked for, not when its neighbours are.
            end = min(end, self.limit)
        numbers, _, samples = self._locate_now(np.arange(run * LOCATED_TOGETHER, end, dtype=np.int64))
        return np.stack([numbers, samples])

    def _locate_now(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self._lanes is None:
            return self.mixture.locate(indices)
        steps, lanes = np.divmod(indices, self._lanes.count)
        turns, windows = np.divmod(steps, self._lanes.windows)
        numbers, epochs, segments = self.mixture.locate(turns * self._lanes.count + lanes)
        return numbers, epochs, segments * self._lanes.windows + windows

    def origin(self, index: int) -> SampleOrigin:
        """Where sample `index` of the run comes from, to trace a loss spike back to text."""
        number, epoch, sample = (int(x[0]) for x in self._locate_now(np.array([index])))
        sequence, source = self._sequences[number], self.mixture.sources[number]
        if self.packing_plan:
            _, _, begins, counts, _ = self.packing_plan.pieces(source, np.array([sample]))
            ranges = list(zip(begins.tolist(), (begins + counts).tolist(), strict=True))
        else:
            start = sample * self.sequence_length
            ranges = [(start, start + self.sequence_length + 1)]
        parts = [
            (sequence.entry(n).file, first, end)
            for begin, stop in ranges
            for n, first, end in sequence.parts(begin, stop)
        ]
        return SampleOrigin(index, source, epoch, sample, parts)


class WindowStream:
    """Every token of a split once, in order, for evaluation: windows of S inputs, source after source.

    The windows of a source cover its targets without overlap; the last one is filled up with the end-of-document id,
    its targets there being MASKED. `source`: only this one. Raises CorpusError when there is nothing to predict.
    """

    def __init__(self, corpus: Corpus, split: str, sequence_length: int, source: str | None = None):
        _check_length(sequence_length)
        self.corpus = corpus
        self.split = split
        self.sequence_length = sequence_length
        self._dtype = np.dtype(corpus.manifest.token_dtype)
        self._labels = [source] if source else corpus.sources(split)
        self._sequences = [corpus.sequence(split, label) for label in self._labels]
        # A window with at least one target; -(-a // b) rounds up.
        counts = [-(-(sequence.tokens - 1) // sequence_length) for sequence in self._sequences]
        self._bounds = list(accumulate(counts, initial=0))
        self.windows = self._bounds[-1]
        self.targets = sum(sequence.tokens - 1 for sequence in self._sequences)
        if not self.windows:
            raise CorpusError(f"{corpus.directory}: split '{split}' has no token to predict; hold out more text")

    @property
    def fingerprint(self) -> str:
        """Identity of the windows (hex sha256): equal fingerprints mean equal tokens in equal order."""
        identity = [self.corpus.fingerprint, self.split, self._labels, self.sequence_length]
        return fingerprint_of(identity)

    def targets_before(self, window: int) -> int:
        """Tokens that the first `window` windows predict."""
        return sum(
            min((min(window, end) - begin) * self.sequence_length, sequence.tokens - 1)
            for begin, end, sequence in zip(self._bounds[:-1], self._bounds[1:], self._sequences, strict=True)
            if begin < window
        )

    def batch(self, first_window: int, count: int, columns: Columns | None = None) -> Batch:
        """Windows first_window ... first_window + count - 1, fewer at the end; `columns` as in `SampleStream.batch`."""
        length = self.sequence_length
        wanted = np.arange(first_window, min(first_window + count, self.windows))
        numbers = np.searchsorted(self._bounds, wanted, side="right") - 1
        columns = columns or Columns(0, length)
        assembly = Assembly(wanted, columns, self.corpus.eod_id, DamagedSamples("fail"))
        for number in np.unique(numbers).tolist():
            rows = np.flatnonzero(numbers == number)
            begins = (wanted[rows] - self._bounds[number]) * length
            valid = np.minimum(length, self._sequences[number].tokens - 1 - begins)
            assembly.add_windows(self._sequences[number], self._dtype, rows, begins, valid)
        return assembly.finish([self._labels[number] for number in numbers.tolist()])


def sequential_batches(
    corpus: Corpus, split: str, sequence_length: int, batch_size: int, source: str | None = None
) -> Iterator[Batch]:
    """Every token of the split (or of one source of it) once, in order; the last batch may hold fewer windows."""
    windows = WindowStream(corpus, split, sequence_length, source)
    for first in range(0, windows.windows, batch_size):
        yield windows.batch(first, batch_size)

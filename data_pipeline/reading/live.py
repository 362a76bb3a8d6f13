"""Samples from text that was not prepared: it is read and tokenized while the run goes on.

The documents, in a fixed order, are dealt to a fixed number of lanes, each to the one with the least text so far;
sample i of the run is window i // lanes of lane i % lanes. Every rank reads all text but tokenizes only the documents
of its own lanes. So the order is the same for any number of ranks, and one integer is its whole state, with the one
difference to a prepared corpus that going on at sample i means to read again, and to tokenize again the rank's share
of, what came before it. That needs a source that gives the same documents again: files on disk, or a data set whose
revision is pinned to a commit. Any other is refused on resume.

There is no shuffle beyond the order of the input files, new in each pass: SlimPajama's files are shuffled already.
"""

from __future__ import annotations

import heapq
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.corpus.manifest import fingerprint_of
from data_pipeline.errors import CorpusError
from data_pipeline.network import NetworkConfig
from data_pipeline.ordering.order import ORDER_VERSION, derive_key, permute
from data_pipeline.reading.batch import Batch, Columns, DamagedSamples, sample_numbers
from data_pipeline.sources.config import MAX_READER_BYTES, TOLERANCE_RECORDS, DataConfig, ToleranceConfig
from data_pipeline.sources.source import Document, Rejection, Source
from data_pipeline.sources.sources import open_source
from data_pipeline.tokenizing.config import TokenizerConfig
from data_pipeline.tokenizing.encoders import choose_encoder
from data_pipeline.tokenizing.lost_text import LostText, describe_losses
from data_pipeline.tokenizing.tokenizer import Tokenizer, load_tokenizer, token_dtype

# Documents are tokenized together up to about so much text, in characters.
BATCH_CHARACTERS = 1 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOG = logging.getLogger(__name__)


class LiveCorpus:
    """Text and the tokenizer for it; what of a `Corpus` can be known without reading the text.

    Raises PrepareError and TokenizerError for a source and a tokenizer that cannot be opened.
    """

    def __init__(self, data: DataConfig, tokenizer: TokenizerConfig, split: str, network: NetworkConfig | None = None):
        self.directory = data.path
        self.data = data
        self.splits = [split]
        self.source = open_source(data)
        self.source.network = network or NetworkConfig()
        self.identity, self.why_not_again = _identity(data, self.source)
        self._tokenizer = load_tokenizer(tokenizer)
        self.encoder, self.notes = choose_encoder(self._tokenizer, tokenizer.backend, list)
        self.notes = [*self._tokenizer.notes, *describe_losses(self._tokenizer), *self.notes]
        self._note_labels()

    def _note_labels(self) -> None:
        if why := self.source.why_unlabelled(self.source.inputs()):
            self.notes.append(f"the first record has {why}. Records without a label count as '{self.data.source}'")

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """Identity of the text (hex sha256), as far as names, sizes or a revision tell it."""
        return fingerprint_of(self.identity)


class LiveStream:
    """The order of samples of text that is tokenized while it is read; the counterpart of `SampleStream`.

    `lanes`: the global batch size, so that a rank keeps to its own lanes. `max_epochs`: passes over the text.
    """

    def __init__(self, corpus: LiveCorpus, sequence_length: int, seed: int, lanes: int, max_epochs: float):
        if sequence_length < 1 or lanes < 1:
            raise ValueError(f"sequence_length and lanes must be at least 1, got {sequence_length} and {lanes}")
        self.corpus = corpus
        self.split = corpus.splits[0]
        self.sequence_length = sequence_length
        self.seed = seed
        self.damage = DamagedSamples("fail")
        self._lanes = lanes
        self._max_epochs = max_epochs
        self._dtype = token_dtype(corpus.vocab_size)
        self._lost_text = LostText(corpus.tokenizer())
        self._lock = threading.Lock()
        self._open: dict[int, _Lane] = {}
        self._chunks: Iterator[list[tuple[int, str, np.ndarray]]] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """As `SampleStream.identity`."""
        return {
            "corpus": self.corpus.fingerprint,
            "tokenizer": self.corpus.tokenizer().fingerprint,
            "format_version": 0,
            "order_version": ORDER_VERSION,
            "split": self.split,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "mixture": "as read",
            "packing": "concatenate",
            "lanes": [self._lanes, 0],
        }

    @property
    def fingerprint(self) -> str:
        """Identity of the order (hex sha256)."""
        return fingerprint_of(self.identity)

    def batch(self, first_sample: int | np.ndarray, count: int | None = None, columns: Columns | None = None) -> Batch:
        """As `SampleStream.batch`; fast where the samples of each lane are asked for one after another.

        Raises CorpusError when text has to be read again that might be another, or after `max_epochs` passes.
        """
        indices = sample_numbers(first_sample, count)
        columns = columns or Columns(0, self.sequence_length)
        shape = (len(indices), self.sequence_length + 1)
        tokens, starts, sources = np.empty(shape, dtype=np.int64), np.zeros(shape, dtype=bool), []
        continues = np.zeros(len(indices), dtype=bool)
        with self._lock:
            self._be_at(indices)
            for row, index in enumerate(indices.tolist()):
                lane = self._open[index % self._lanes]
                while not lane.has_window():
                    self._read_more()
                continues[row] = lane.window > 0
                sources.append(lane.take(tokens[row], starts[row]))
        begin, end = columns.begin, columns.end
        arrays = tokens[:, begin:end], tokens[:, begin + 1 : end + 1], starts[:, begin:end]
        inputs, targets, starting = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
        return Batch(inputs, targets, starting, sources, torch.from_numpy(continues))

    def _be_at(self, indices: np.ndarray) -> None:
        """Bring each lane to the window that is asked for next."""
        wanted: dict[int, int] = {}
        for index in indices.tolist():
            wanted.setdefault(index % self._lanes, index // self._lanes)
        if self._chunks is None or any(
            lane not in self._open or self._open[lane].window > window for lane, window in wanted.items()
        ):
            windows = {lane: state.window for lane, state in self._open.items()} | wanted
            self._begin_again(windows)
        for lane, window in wanted.items():
            while self._open[lane].window < window:
                while not self._open[lane].has_window():
                    self._read_more()
                self._open[lane].skip()

    def _begin_again(self, windows: dict[int, int]) -> None:
        before = sum(windows.values()) * self.sequence_length
        if self.corpus.why_not_again and (before or self._chunks is not None):
            raise CorpusError(f"the samples before cannot be read again: {self.corpus.why_not_again}")
        if before:
            _LOG.info("reading again what came before: about %d tokens of this rank", before)
        self._open = {lane: _Lane(self.sequence_length) for lane in windows}
        self._chunks = self._read()

    def _read_more(self) -> None:
        assert self._chunks is not None
        try:
            chunk = next(self._chunks)
        except Exception:
            # It has ended with its error; the next batch begins again, and meets the error again.
            self._chunks = None
            raise
        for lane, source, ids in chunk:
            self._open[lane].add(source, ids)

    def _read(self) -> Iterator[list[tuple[int, str, np.ndarray]]]:
        """(lane, source, ids with the end-of-document id) of the documents of the open lanes, a batch at a time."""
        filled = [(0, lane) for lane in range(self._lanes)]
        mine = set(self._open)
        for epoch in range(int(self._max_epochs)):
            read, labelled, waiting, characters = 0, 0, [], 0
            losses = _Losses(self.corpus.data.tolerance)
            for record in self._records(epoch):
                losses.add(record)
                if not isinstance(record, Document):
                    continue
                labelled += not record.unlabelled
                if record.split != self.split or not record.text.strip():
                    continue
                read += 1
                size, lane = heapq.heappop(filled)
                heapq.heappush(filled, (size + len(record.text), lane))
                if lane in mine:
                    waiting.append((lane, record))
                    characters += len(record.text)
                if characters >= BATCH_CHARACTERS:
                    yield self._encode(waiting, losses)
                    waiting, characters = [], 0
            last = self._encode(waiting, losses)
            losses.check()
            if not read:
                raise CorpusError(f"data.path={self.corpus.directory}: no document of split '{self.split}' was found")
            if not labelled:
                why = self.corpus.source.why_unlabelled(self.corpus.source.inputs())
                raise CorpusError(
                    f"corpus.live.data.source_field={self.corpus.data.source_field}: no document has such "
                    f"a source label.{f' The first record has {why}.' if why else ''} Set it "
                    "to a field that is there, or to null for no labels"
                )
            if losses.rejected:
                _LOG.warning("pass %d: %d documents, %d records gave none", epoch, read, losses.rejected)
            yield last
        raise CorpusError(
            f"corpus.max_epochs: the text was read {int(self._max_epochs)} times; shorten the run, find more text, "
            "or raise corpus.max_epochs"
        )

    def _records(self, epoch: int) -> Iterator[Any]:
        inputs = self.corpus.source.inputs()
        order = permute(np.arange(len(inputs)), len(inputs), derive_key(self.seed, "live inputs", epoch))
        for place in order.tolist():
            yield from self.corpus.source.read(inputs[place], lambda count: None)

    def _encode(self, waiting: list[tuple[int, Document]], losses: _Losses) -> list[tuple[int, str, np.ndarray]]:
        if not waiting:
            return []
        texts = [_utf8(document.text) for _, document in waiting]
        ids, offsets = self.corpus.encoder.encode(texts)
        lost = self._lost_text.of_batch(texts, ids, offsets)
        losses.add_text(sum(map(len, texts)), sum(lost.values()), waiting[next(iter(lost), 0)][1])
        end = np.array([self.corpus.tokenizer().eod_id], dtype=self._dtype)
        return [
            (lane, document.source, np.concatenate((ids[offsets[n] : offsets[n + 1]].astype(self._dtype), end)))
            for n, (lane, document) in enumerate(waiting)
        ]


class _Losses:
    """What of the text of one pass gave no document, within `data.tolerance`."""

    def __init__(self, tolerance: ToleranceConfig):
        self.rejected = 0
        self._tolerance = tolerance
        self._records = 0
        self._damaged: set[str] = set()
        self._first: Rejection | None = None
        self._text_bytes = 0
        self._lost_bytes = 0
        self._warned = False
        self._first_lost: Document | None = None

    def add(self, record: Document | Rejection) -> None:
        """Count a record. Raises CorpusError when too much is lost."""
        self._records += 1
        if not isinstance(record, Rejection):
            return
        self.rejected += 1
        self._first = self._first or record
        if record.loses_a_file:
            self._damaged.add(record.file)
            if len(self._damaged) > self._tolerance.damaged_files:
                self._refuse(
                    f"{len(self._damaged)} damaged files, tolerance.damaged_files allows "
                    f"{self._tolerance.damaged_files}",
                    record,
                )
            _LOG.warning("%s (what comes before is used)", record)
        if self._records >= TOLERANCE_RECORDS:
            self.check()

    def add_text(self, text_bytes: int, lost_bytes: int, first: Document) -> None:
        """Count text that was encoded, and what the tokenizer lost of it. Raises CorpusError when that is too much."""
        self._text_bytes += text_bytes
        self._lost_bytes += lost_bytes
        if lost_bytes and self._first_lost is None:
            self._first_lost = first
        if self._text_bytes >= BATCH_CHARACTERS:
            self._check_lost_text()

    def _check_lost_text(self) -> None:
        share, document = self._lost_bytes / max(1, self._text_bytes), self._first_lost
        if document is None or share <= self._tolerance.lost_text_warning:
            return
        place = f"{document.file}, record {document.position}" if document.position else document.file
        found = f"the tokenizer loses {share:.3%} of the text (first in {place})"
        if share > self._tolerance.lost_text_fraction:
            raise CorpusError(
                f"corpus.live.tokenizer: {found}, corpus.live.data.tolerance.lost_text_fraction allows "
                f"{self._tolerance.lost_text_fraction:.3%}. Take a tokenizer with bytes for what is not in its "
                "vocabulary, or raise the tolerance"
            )
        if not self._warned:
            _LOG.warning("%s", found)
        self._warned = True

    def check(self) -> None:
        """Raises CorpusError when too large a share of the records so far was rejected, or of their text lost."""
        self._check_lost_text()
        if self._first is not None and self.rejected > self._tolerance.rejected_fraction * self._records:
            self._refuse(
                f"{self.rejected} of {self._records} records rejected, tolerance.rejected_fraction allows "
                f"{self._tolerance.rejected_fraction:.3%}",
                self._first,
            )

    def _refuse(self, problem: str, place: Rejection) -> None:
        raise CorpusError(
            f"corpus.live.data: too much of the text is lost: {problem}. {place}. Mend the input, or "
            "raise corpus.live.data.tolerance (a run that has started needs a reason in corpus.allow_changed_data for "
            "it)"
        )


class _Lane:
    """The documents of one lane, one after another, and the window that is taken next."""

    def __init__(self, length: int):
        self.window = 0
        self._length = length
        self._documents: list[tuple[str, np.ndarray]] = []
        self._tokens = 0
        # Tokens of the first document that were taken.
        self._taken = 0

    def add(self, source: str, ids: np.ndarray) -> None:
        self._documents.append((source, ids))
        self._tokens += len(ids)

    def has_window(self) -> bool:
        return self._tokens > self._length

    def take(self, tokens: np.ndarray, starts: np.ndarray) -> str:
        """Copy the next window, one token longer, and mark document starts; returns the first token's source."""
        place, number, first = 0, 0, self._taken
        starts[0] = self.window == 0
        while place <= self._length:
            ids = self._documents[number][1][first:]
            part = ids[: self._length + 1 - place]
            tokens[place : place + len(part)] = part
            place += len(part)
            if len(part) == len(ids):
                # The end-of-document id closes this document and opens the next one.
                starts[place - 1] = True
            number, first = number + 1, 0
        source = self._documents[0][0]
        self.skip()
        return source

    def skip(self) -> None:
        left = self._length
        while left:
            here = len(self._documents[0][1]) - self._taken
            step = min(left, here)
            left -= step
            self._taken += step
            if step == here:
                self._documents.pop(0)
                self._taken = 0
        self._tokens -= self._length
        self.window += 1


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        # As `prepare` does: surrogates that form a pair become their character, the others U+FFFD.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode("utf-8")


def _identity(data: DataConfig, source: Source) -> tuple[list[Any], str | None]:
    """What the text depends on, and why it may be another the next time (None: it is not)."""
    settings: list[Any] = [data.kind, data.text_field, data.source_field, data.source, data.split.rule, data.split.seed]
    settings += [data.split.unit, data.split.validation_fraction, data.split.test_fraction, data.max_record_bytes]
    if data.max_reader_bytes != MAX_READER_BYTES:
        # Runs that began before there was the key go on.
        settings.append(data.max_reader_bytes)
    if source.root is not None:
        return [*settings, [[item.name, item.bytes] for item in source.inputs()]], None
    if data.path is not None and Path(data.path).exists():
        files = sorted(path for path in Path(data.path).rglob("*") if path.is_file())
        return [*settings, [[path.relative_to(data.path).as_posix(), path.stat().st_size] for path in files]], None
    named = [*settings, data.path, data.subset, data.revision]
    if data.revision and _COMMIT.fullmatch(data.revision):
        return named, None
    return named, (
        f"data set {data.path} has no pinned revision ({data.revision}), so it may have changed; set data.revision to "
        "a commit (40 hexadecimal digits), or prepare a corpus"
    )

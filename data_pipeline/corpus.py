"""A prepared corpus opened for reading: checked against its manifest, shards memory-mapped when first used."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np

from data_pipeline.errors import CorpusError, TokenizerError
from data_pipeline.manifest import Manifest, ShardEntry
from data_pipeline.shards import SHARD_FORMAT_VERSION, Shard, hash_file, token_dtype
from data_pipeline.tokenizer import Tokenizer

# Shards of one source that stay mapped at a time: each holds a file descriptor.
MAX_OPEN_SHARDS = 256


class Corpus:
    """A prepared corpus. Use `Corpus.open`."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory = directory
        self.manifest = manifest
        self._sequences: dict[tuple[str, str], TokenSequence] = {}
        self._tokenizer: Tokenizer | None = None

    @staticmethod
    def open(directory: str | Path, check: str = "hash") -> Corpus:
        """Open the corpus in `directory` after checking that it is complete and as it was written.

        `check`: "hash" compares the size and the xxh3 of every shard with the manifest (about 10 GB/s), "size" only
        the sizes. Raises CorpusError, naming the first faulty file.
        """
        if check not in ("hash", "size"):
            raise ValueError(f"Corpus.open: check must be 'hash' or 'size', got '{check}'")
        directory = Path(directory)
        manifest = Manifest.read(directory)
        if not manifest.shards:
            raise CorpusError(f"{directory}: the corpus is empty; prepare it again from a source that holds documents")
        for entry in manifest.shards:
            problem = check_shard_file(directory, entry, with_hash=check == "hash")
            if problem:
                raise CorpusError(f"{directory / entry.file}: {problem}; restore it or prepare the corpus again")
        corpus = Corpus(directory, manifest)
        corpus.tokenizer()
        return corpus

    @property
    def fingerprint(self) -> str:
        """Identity of the data (hex sha256): equal fingerprints mean equal tokens in equal order."""
        return self.manifest.fingerprint

    @property
    def vocab_size(self) -> int:
        return self.manifest.tokenizer.vocab_size

    @property
    def eod_id(self) -> int:
        return self.manifest.tokenizer.eod_id

    @property
    def splits(self) -> list[str]:
        return sorted(self.manifest.splits)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that wrote the shards. Raises CorpusError when its file does not belong to them."""
        if self._tokenizer is None:
            entry = self.manifest.tokenizer
            path = self.directory / entry.file
            if not path.is_file():
                raise CorpusError(f"{path}: the corpus' tokenizer is missing; restore it or prepare the corpus again")
            try:
                tokenizer = Tokenizer.load(path, entry.eod_token)
            except TokenizerError as error:
                raise CorpusError(f"{error}; restore the file or prepare the corpus again") from None
            if tokenizer.fingerprint != entry.fingerprint:
                raise CorpusError(
                    f"{path}: not the tokenizer that wrote this corpus (fingerprint {tokenizer.fingerprint[:12]}, the "
                    f"manifest has {entry.fingerprint[:12]}); restore the file or prepare the corpus again"
                )
            if tokenizer.probe_sha256 != entry.probe_sha256:
                raise CorpusError(
                    f"{path}: {entry.library} {tokenizer.library_version} encodes text differently from "
                    f"{entry.library} {entry.library_version}, which wrote this corpus; install that version"
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    def sources(self, split: str) -> list[str]:
        """Source labels of a split, sorted. Raises CorpusError for a split that the corpus lacks."""
        if split not in self.manifest.splits:
            raise CorpusError(f"{self.directory}: no split '{split}'; the corpus has {', '.join(self.splits)}")
        return sorted(self.manifest.splits[split])

    def tokens(self, split: str, source: str | None = None) -> int:
        """Token ids in a split (or in one source of it), end-of-document ids included."""
        return sum(self.sequence(split, label).tokens for label in ([source] if source else self.sources(split)))

    def text_bytes(self, split: str, source: str | None = None) -> int:
        """UTF-8 bytes of the text of a split (or of one source of it)."""
        labels = [source] if source else self.sources(split)
        return sum(self.manifest.splits[split][label]["text_bytes"] for label in labels)

    def sequence(self, split: str, source: str) -> TokenSequence:
        """All tokens of one source of a split, in manifest order."""
        if source not in self.sources(split):
            raise CorpusError(
                f"{self.directory}: no source '{source}' in split '{split}'; it has {', '.join(self.sources(split))}"
            )
        if (split, source) not in self._sequences:
            entries = [e for e in self.manifest.shards if e.split == split and e.source == source]
            self._sequences[split, source] = TokenSequence(self.directory, entries, self.manifest)
        return self._sequences[split, source]


def check_shard_file(directory: Path, entry: ShardEntry, with_hash: bool, with_sha256: bool = False) -> str | None:
    """How the file of a shard differs from its manifest entry; None when it does not."""
    path = directory / entry.file
    if not path.is_file():
        return "the shard is missing"
    size = path.stat().st_size
    if size < entry.bytes:
        return f"truncated: {size} bytes, the manifest says {entry.bytes}"
    if size > entry.bytes:
        return f"altered: {size} bytes, the manifest says {entry.bytes}"
    if not with_hash:
        return None
    found = hash_file(path, with_sha256)
    for number, (mine, theirs) in enumerate(zip(found.xxh3_64_blocks, entry.xxh3_64_blocks, strict=False)):
        if mine != theirs:
            return f"altered: the 4 MiB block {number} has another content than when it was written (xxh3 differs)"
    if found.xxh3_128 != entry.xxh3_128 or with_sha256 and found.sha256 != entry.sha256:
        return "altered: it has another content than when it was written (checksum differs)"
    return None


class TokenSequence:
    """The shards of one source as one long sequence of tokens, read by memory mapping. Safe to use from threads."""

    def __init__(self, directory: Path, entries: list[ShardEntry], manifest: Manifest):
        self.entries = entries
        self._directory = directory
        self._manifest = manifest
        self._bounds = list(accumulate((entry.tokens for entry in entries), initial=0))
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        return self._bounds[-1]

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard number, first token, end) of each shard that holds a part of [start, stop), within the shard."""
        number = bisect_right(self._bounds, start) - 1
        while start < stop:
            base, bound = self._bounds[number], self._bounds[number + 1]
            end = min(stop, bound)
            yield number, start - base, end - base
            start = end
            number += 1

    def read(self, start: int, tokens: np.ndarray, starts: np.ndarray) -> None:
        """Copy the tokens from position `start` on into `tokens` [n], and set `starts` (bool [n]) at document starts.

        A document starts at position 0 and at each end-of-document id: the id that closes a document opens the next
        one. Ends are found by offsets, never by the value of an id.
        """
        place = 0
        for number, first, end in self.parts(start, start + len(tokens)):
            shard = self.shard(number)
            tokens[place : place + end - first] = shard.tokens[first:end]
            # Scalars of the offsets' own type: any other would convert the whole memory-mapped array.
            low, high = shard.offsets.searchsorted(np.array((first + 1, end + 1), dtype=shard.offsets.dtype))
            if low < high:
                starts[shard.offsets[low:high] + (place - first - 1)] = True
            place += end - first
        if start == 0:
            starts[:1] = True

    def shard(self, number: int) -> Shard:
        """Shard `number` of this sequence, mapped. Raises CorpusError when it is not what the manifest describes."""
        with self._lock:
            shard = self._open.get(number)
            if shard is None:
                shard = self._open_shard(self.entries[number])
                self._open[number] = shard
                if len(self._open) > MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(number)
            return shard

    def _open_shard(self, entry: ShardEntry) -> Shard:
        path = self._directory / entry.file
        shard = Shard(path)
        for key, value in shard_metadata(entry, self._manifest.tokenizer.fingerprint).items():
            if shard.metadata.get(key) != value:
                raise CorpusError(
                    f"{path}: its {key} is '{shard.metadata.get(key)}', the manifest says '{value}'; "
                    "restore the shard or prepare the corpus again"
                )
        shape = (shard.documents, len(shard.tokens), shard.tokens.dtype)
        if shape != (entry.documents, entry.tokens, token_dtype(self._manifest.tokenizer.vocab_size)):
            raise CorpusError(
                f"{path}: {shape[0]} documents and {shape[1]} {shape[2]} tokens, the manifest says {entry.documents} "
                f"and {entry.tokens} {self._manifest.token_dtype}; restore the shard or prepare the corpus again"
            )
        return shard


def shard_metadata(entry: ShardEntry, tokenizer_fingerprint: str) -> dict[str, str]:
    """What the schema of a shard repeats of its manifest entry."""
    return {
        "shard_format_version": str(SHARD_FORMAT_VERSION),
        "split": entry.split,
        "source": entry.source,
        "unit": str(entry.unit),
        "tokenizer_fingerprint": tokenizer_fingerprint,
    }

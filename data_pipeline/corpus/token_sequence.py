"""The shards of one source as one long sequence of tokens, read a range at a time and checked before a token is served.

Ranges are read with `preadv` straight into the caller's batch: one copy, from the page cache; resident memory does not
grow with what was read, and a file that is truncated under the reader is an error with its name, where a memory map
would end the process with SIGBUS. What a rank keeps of a shard is a few integers in arrays: its place in the sequence,
where its columns lie in the file, one flag a block, and some of its document offsets.

A block of a file (4 MiB) is compared with its checksum in the manifest when it is first read from: start-up reads
nothing, and a damaged bit is still found before a token of its block is used.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from data_pipeline.corpus.blocks import RESTORE, as_bytes, check_block, read_exactly
from data_pipeline.corpus.manifest import Manifest
from data_pipeline.corpus.open_files import Descriptor, OpenFiles
from data_pipeline.corpus.shard_table import ShardEntry
from data_pipeline.corpus.shards import SHARD_FORMAT_VERSION, Shard
from data_pipeline.errors import OUT_OF_RESOURCES, CorpusError, ReadingError

# Sources of up to so many documents have all document offsets in memory (16 MiB), larger ones one in INDEX_STRIDE, and
# the others are read with the tokens.
INDEXED_DOCUMENTS = 1 << 21
INDEX_STRIDE = 128
_OFFSET = np.dtype(np.int32)
OnError = Callable[[int, CorpusError], None]


class TokenSequence:
    """All tokens of one source of a split, in manifest order. Safe to use from threads.

    `rows`: its shards, int64, by their rows in the table of shards.
    """

    def __init__(self, manifest: Manifest, rows: np.ndarray, files: OpenFiles):
        table = manifest.shards
        self._manifest = manifest
        self._rows = rows
        self._files = files
        self._lock = threading.Lock()
        self._dtype = np.dtype(manifest.token_dtype)
        self._bounds = np.concatenate(([0], np.cumsum(table.tokens[rows], dtype=np.int64)))
        blocks = -(-table.bytes[rows] // manifest.block_bytes)
        self._block_bounds = np.concatenate(([0], np.cumsum(blocks, dtype=np.int64)))
        self._checked = np.zeros(int(self._block_bounds[-1]), dtype=bool)
        # Byte offsets of the columns `tokens` and document offsets in each file; 0: not opened yet.
        self._columns = np.zeros((len(rows), 2), dtype=np.int64)
        self._documents = table.documents[rows]
        self._stride = 1 if int(self._documents.sum()) <= INDEXED_DOCUMENTS else INDEX_STRIDE
        entries = -(-(self._documents + 1) // self._stride)
        self._index_bounds = np.concatenate(([0], np.cumsum(entries, dtype=np.int64)))
        # Places in the sequence, so that one search serves all shards; those of unopened shards are their beginnings.
        self._index = np.repeat(self._bounds[:-1], entries)

    @property
    def tokens(self) -> int:
        return int(self._bounds[-1])

    @property
    def shards(self) -> int:
        return len(self._rows)

    def first_samples(self, span: int, samples: int) -> np.ndarray:
        """Numbers of the samples that begin in each shard, as int64 [shards + 1]: shard s begins [s], ..., [s + 1] - 1.

        Sample k begins at token k * span; there are `samples` of them.
        """
        return np.minimum(-(-self._bounds // span), samples)

    @cached_property
    def entries(self) -> list[ShardEntry]:
        """The manifest's entries of all shards: for looking into a corpus, not for reading it."""
        return [self.entry(number) for number in range(self.shards)]

    def entry(self, number: int) -> ShardEntry:
        return self._manifest.shards[int(self._rows[number])]

    def path(self, number: int) -> str | Path:
        """Where shard `number` of the sequence lies: its file, or its URL."""
        return self._files.locate(int(self._rows[number]))

    def _descriptor(self, number: int) -> Descriptor:
        return self._files.get(int(self._rows[number]))

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard number, first token, end) of each shard that holds a part of [start, stop), within the shard."""
        number = int(np.searchsorted(self._bounds, start, side="right")) - 1
        while start < stop:
            base, bound = int(self._bounds[number]), int(self._bounds[number + 1])
            end = min(stop, bound)
            yield number, start - base, end - base
            start = end
            number += 1

    def fetch(
        self,
        places: np.ndarray,
        begins: np.ndarray,
        counts: np.ndarray,
        out: np.ndarray,
        starts: np.ndarray | None = None,
        on_error: OnError | None = None,
    ) -> None:
        """Copy ranges of the sequence into `out` (flat, contiguous, the corpus' token dtype) and mark document starts.

        Range r is tokens [begins[r], begins[r] + counts[r]); it goes to out[places[r]:], all int64 [R]. `starts` (flat
        bool, as long as `out`, False before): True where a document starts: at position 0 and at each end-of-document
        id, which closes a document and opens the next one. Ends are found by offsets, never by the value of an id.
        Raises CorpusError naming the damaged shard, before any token of a damaged block is in `out`; with `on_error` it
        is called instead with the number of the range, and that range is left out.
        """
        if not len(begins):
            return
        ranges = np.arange(len(begins))
        numbers = np.searchsorted(self._bounds, begins, side="right") - 1
        if (begins + counts > self._bounds[numbers + 1]).any():
            ranges, numbers, places, begins, counts = self._split(places, begins, counts)
        failed: dict[int, CorpusError] = {}

        def fail(piece: int, error: CorpusError) -> None:
            if on_error is None:
                raise error
            # Its traceback would hold the block that was compared, 4 MiB for each range.
            failed.setdefault(int(ranges[piece]), error.with_traceback(None))

        self._open_all(numbers, fail)
        item = self._dtype.itemsize
        offsets = self._columns[numbers, 0] + (begins - self._bounds[numbers]) * item
        self._check_all(numbers, offsets, counts * item, fail)
        data = as_bytes(out)
        self._read_ranges(numbers, offsets, counts * item, places * item, data, ranges, failed, fail)
        if starts is not None:
            if self._stride == 1:
                self._mark_indexed_starts(starts, numbers, places, begins, counts)
            else:
                self._mark_read_starts(starts, numbers, places, begins, counts, ranges, failed, fail)
            starts[places[begins == 0]] = True
        for error_range, error in failed.items():
            assert on_error is not None
            on_error(error_range, error)

    def _read_ranges(
        self,
        numbers: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        places: np.ndarray,
        data: memoryview,
        ranges: np.ndarray,
        failed: dict[int, CorpusError],
        fail: Callable[[int, CorpusError], None],
    ) -> None:
        """Bytes [offsets[p], offsets[p] + sizes[p]) of shard numbers[p] to data[places[p] :], for every piece p."""
        preadv, descriptor_of, remote = os.preadv, self._files.get, self._files.remote
        block = self._manifest.block_bytes
        columns = (x.tolist() for x in (self._rows[numbers], places, places + sizes, offsets, sizes))
        for piece, (row, place, end, offset, size) in enumerate(zip(*columns, strict=True)):
            if failed and int(ranges[piece]) in failed:
                continue
            try:
                if remote is None:
                    descriptor = descriptor_of(row)
                else:
                    blocks = range(offset // block, (offset + size - 1) // block + 1)
                    descriptor = self._cached(int(numbers[piece]), blocks)
                if preadv(descriptor.number, [data[place:end]], offset) != size:
                    read_exactly(self._files.locate(row), descriptor.number, data[place:end], offset)
            except OSError as error:
                fail(piece, self._unreadable(int(numbers[piece]), error))
            except CorpusError as error:
                fail(piece, error)

    def check(self, begins: np.ndarray, counts: np.ndarray, on_error: OnError) -> None:
        """Do what `fetch` does before it copies: call `on_error` for each range that touches a damaged block."""
        ranges, numbers, _, begins, counts = self._split(begins, begins, counts)

        def fail(piece: int, error: CorpusError) -> None:
            on_error(int(ranges[piece]), error)

        self._open_all(numbers, fail)
        item = self._dtype.itemsize
        offsets = self._columns[numbers, 0] + (begins - self._bounds[numbers]) * item
        self._check_all(numbers, offsets, counts * item, fail)
        if self._files.remote is not None:
            self._check_cached(numbers, offsets, counts * item, fail)

    def _split(self, places: np.ndarray, begins: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, ...]:
        """Ranges cut at the ends of shards: (range, shard number, place, begin, count) of each piece."""
        pieces = []
        for r, (place, begin, count) in enumerate(zip(places.tolist(), begins.tolist(), counts.tolist(), strict=True)):
            for number, first, end in self.parts(begin, begin + count):
                at = int(self._bounds[number]) + first
                pieces.append((r, number, place + at - begin, at, end - first))
        return tuple(np.array(column, dtype=np.int64) for column in zip(*pieces, strict=True))

    def _open_all(self, numbers: np.ndarray, fail: Callable[[int, CorpusError], None]) -> None:
        unopened = numbers[self._columns[numbers, 0] == 0]
        for number in np.unique(unopened).tolist() if unopened.size else ():
            try:
                self._open(number)
            except CorpusError as error:
                for piece in np.flatnonzero(numbers == number).tolist():
                    fail(piece, error)

    def _open(self, number: int) -> None:
        """Find the columns of a shard and index its document offsets, all checked."""
        path = self.path(number)
        entry = self.entry(number)
        try:
            descriptor = self._descriptor(number)
            size = os.fstat(descriptor.number).st_size
        except FileNotFoundError:
            raise CorpusError(f"{path}: the shard is missing; {RESTORE}") from None
        except OSError as error:
            raise self._unreadable(number, error) from None
        if size != entry.bytes:
            kind = "truncated" if size < entry.bytes else "altered"
            raise CorpusError(f"{path}: {kind}: {size} bytes, the manifest says {entry.bytes}; {RESTORE}")
        last = int(self._block_bounds[number + 1] - self._block_bounds[number]) - 1
        if size < 1 or last != (size - 1) // self._manifest.block_bytes:
            raise CorpusError(f"{path}: altered: the manifest has {last + 1} checksums for {size} bytes; {RESTORE}")
        # The footer and the schema, before they are parsed.
        self._check(number, [0, last])
        if self._files.remote is not None:
            # By its descriptor: under its name the cache may have begun another file.
            descriptor = self._cached(number, [0, last])
            path = Path(f"/proc/self/fd/{descriptor.number}")
        shard = open_shard(path, entry, self._manifest)
        places = shard.column_places()
        offsets = np.empty(shard.documents + 1, dtype=_OFFSET)
        block = self._manifest.block_bytes
        blocks = range(places[1] // block, (places[1] + offsets.nbytes - 1) // block + 1)
        self._check(number, blocks)
        if self._files.remote is not None:
            descriptor = self._cached(number, blocks)
        self._read(number, descriptor, as_bytes(offsets), places[1])
        if offsets[0] != 0 or offsets[-1] != entry.tokens or (np.diff(offsets) < 1).any():
            raise CorpusError(f"{path}: document offsets do not rise from 0 to the number of tokens; {RESTORE}")
        with self._lock:
            begin, end = self._index_bounds[number : number + 2]
            self._index[begin:end] = offsets[:: self._stride].astype(np.int64) + self._bounds[number]
            self._columns[number] = places[0], places[1]

    def _check_all(
        self, numbers: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, fail: Callable[[int, CorpusError], None]
    ) -> None:
        """Compare with the manifest every block that a piece touches and that was not compared before."""
        block = self._manifest.block_bytes
        low, high = offsets // block, (offsets + sizes - 1) // block
        if self._files.remote is not None:
            # Fetched, and compared, with the file that the tokens are then read from.
            return
        base = self._block_bounds[numbers]
        unchecked = ~(self._checked[base + low] & self._checked[base + high]) | (high - low > 1)
        if not unchecked.any():
            return
        pieces = [p for p in np.flatnonzero(unchecked).tolist() if self._columns[numbers[p], 0]]
        for piece in pieces:
            # The disk reads all of them while the first is being hashed.
            self._read_ahead(int(numbers[piece]), int(low[piece]), int(high[piece]))
        for piece in pieces:
            try:
                self._check(int(numbers[piece]), range(int(low[piece]), int(high[piece]) + 1))
            except CorpusError as error:
                fail(piece, error)

    def _check_cached(
        self, numbers: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, fail: Callable[[int, CorpusError], None]
    ) -> None:
        block = self._manifest.block_bytes
        for piece in np.flatnonzero(self._columns[numbers, 0]).tolist():
            begin, end = int(offsets[piece]), int(offsets[piece] + sizes[piece])
            try:
                self._cached(int(numbers[piece]), range(begin // block, (end - 1) // block + 1))
            except CorpusError as error:
                fail(piece, error)

    def _read_ahead(self, number: int, low: int, high: int) -> None:
        block = self._manifest.block_bytes
        try:
            descriptor = self._descriptor(number)
            os.posix_fadvise(descriptor.number, low * block, (high + 1 - low) * block, os.POSIX_FADV_WILLNEED)
        except (OSError, CorpusError):
            return  # The read that follows says what is wrong.

    def _check(self, number: int, blocks: range | list[int]) -> None:
        if self._files.remote is not None:
            self._cached(number, blocks)
            return
        base = int(self._block_bounds[number])
        todo = [block for block in blocks if not self._checked[base + block]]
        if not todo:
            return
        row = int(self._rows[number])
        expected = self._manifest.shards.block_hashes(row)
        total = int(self._manifest.shards.bytes[row])
        name, size = self._files.locate(row), self._manifest.block_bytes
        try:
            descriptor = self._descriptor(number)
            for block in todo:
                check_block(name, descriptor.number, block, size, total, expected)
                self._checked[base + block] = True
        except OSError as error:
            raise self._unreadable(number, error) from None

    def _cached(self, number: int, blocks: range | list[int]) -> Descriptor:
        """The cached file of a shard with these blocks in it, compared. Raises CorpusError."""
        row, remote, size = int(self._rows[number]), self._files.remote, self._manifest.block_bytes
        assert remote is not None
        expected, total = self._manifest.shards.block_hashes(row), int(self._manifest.shards.bytes[row])
        name = remote.name(row)

        def is_right(descriptor: Descriptor, block: int) -> bool:
            try:
                check_block(name, descriptor.number, block, size, total, expected)
            except CorpusError:
                return False
            return True

        descriptor = self._descriptor(number)
        while todo := [block for block in blocks if block not in descriptor.checked]:
            if not is_right(descriptor, todo[0]):
                # What the cache has dropped takes room for as long as it is open.
                self._files.forget_unlinked()
                if os.fstat(descriptor.number).st_nlink == 0:
                    # What is fetched from now on goes to another file of its name.
                    descriptor = self._descriptor(number)
                    continue
                fetched_by_another = partial(is_right, descriptor, todo[0])
                remote.fill(row, todo[0], descriptor.number, fetched_by_another, self._files.forget_unlinked)
                check_block(name, descriptor.number, todo[0], size, total, expected)
            descriptor.checked.add(todo[0])
        return descriptor

    def _mark_read_starts(
        self,
        starts: np.ndarray,
        numbers: np.ndarray,
        places: np.ndarray,
        begins: np.ndarray,
        counts: np.ndarray,
        ranges: np.ndarray,
        failed: dict[int, CorpusError],
        fail: Callable[[int, CorpusError], None],
    ) -> None:
        """Read the document offsets among which those of each piece are, and mark its starts."""
        base = self._index_bounds[numbers]
        low = np.maximum(np.searchsorted(self._index, begins + 1) - 1 - base, 0)
        high = np.searchsorted(self._index, begins + counts, side="right") - base
        first = low * self._stride
        found = np.minimum(np.maximum(high, low + 1) * self._stride, self._documents[numbers] + 1) - first
        ends = np.cumsum(found)
        # Zeros where nothing was read, which are before every piece.
        buffer = np.zeros(int(ends[-1]), dtype=_OFFSET)
        item = _OFFSET.itemsize
        offsets = self._columns[numbers, 1] + first * item
        data = as_bytes(buffer)
        self._read_ranges(numbers, offsets, found * item, (ends - found) * item, data, ranges, failed, fail)
        within = begins - self._bounds[numbers]
        position = buffer - np.repeat((within + 1).astype(_OFFSET), found)
        inside = np.flatnonzero((position >= 0) & (position < np.repeat(counts.astype(_OFFSET), found)))
        piece = np.searchsorted(ends, inside, side="right")
        starts[places[piece] + position[inside]] = True

    def _mark_indexed_starts(
        self, starts: np.ndarray, numbers: np.ndarray, places: np.ndarray, begins: np.ndarray, counts: np.ndarray
    ) -> None:
        low = np.searchsorted(self._index, begins + 1)
        # A shard that is not open yet repeats its beginning in the index.
        high = np.minimum(np.searchsorted(self._index, begins + counts, side="right"), self._index_bounds[numbers + 1])
        found = np.maximum(high - low, 0)
        ends = np.cumsum(found)
        which = np.arange(int(ends[-1])) + np.repeat(low - (ends - found), found)
        starts[np.repeat(places - begins, found) + self._index[which] - 1] = True

    def _read(self, number: int, descriptor: Descriptor, into: memoryview, offset: int) -> None:
        if os.preadv(descriptor.number, [into], offset) < len(into):
            read_exactly(self.path(number), descriptor.number, into, offset)

    def _unreadable(self, number: int, error: OSError) -> CorpusError:
        path = self.path(number)
        self._files.forget(int(self._rows[number]))
        if error.errno in OUT_OF_RESOURCES:
            return ReadingError(f"{path}: cannot be read now ({error.strerror}); raise the limits of the machine")
        return CorpusError(f"{path}: cannot be read ({error.strerror or error}); {RESTORE}")

    def document_offsets(self, number: int) -> np.ndarray:
        """Where the documents of a shard begin and end, as places in the sequence: int64 [documents + 1]."""
        self._open(number)
        offsets = np.empty(int(self._documents[number]) + 1, dtype=_OFFSET)
        place, block = int(self._columns[number, 1]), self._manifest.block_bytes
        descriptor = self._descriptor(number)
        if self._files.remote is not None:
            descriptor = self._cached(number, range(place // block, (place + offsets.nbytes - 1) // block + 1))
        self._read(number, descriptor, as_bytes(offsets), place)
        return offsets.astype(np.int64) + self._bounds[number]

    def read(self, start: int, tokens: np.ndarray, starts: np.ndarray) -> None:
        """`fetch` of one range: the tokens from `start` on into `tokens` [n], document starts into `starts` [n]."""
        place, begin, count = (np.array([x], dtype=np.int64) for x in (0, start, len(tokens)))
        self.fetch(place, begin, count, tokens, starts)

    def shard(self, number: int) -> Shard:
        """Shard `number` of this sequence as a whole, memory-mapped, every block compared with the manifest.

        Raises CorpusError when it is not what the manifest describes.
        """
        self._open(number)
        blocks = range(int(self._block_bounds[number + 1] - self._block_bounds[number]))
        self._check(number, blocks)
        path = self.path(number)
        if self._files.remote is not None:
            path = Path(f"/proc/self/fd/{self._cached(number, blocks).number}")
        return open_shard(path, self.entry(number), self._manifest)


def open_shard(path: str | Path, entry: ShardEntry, manifest: Manifest) -> Shard:
    """Map a shard and compare what its schema and columns say with its manifest entry. Raises CorpusError."""
    shard = Shard(path)
    for key, value in shard_metadata(entry, manifest.tokenizer.fingerprint).items():
        if shard.metadata.get(key) != value:
            raise CorpusError(
                f"{path}: its {key} is '{shard.metadata.get(key)}', the manifest says '{value}'; "
                "restore the shard or prepare the corpus again elsewhere"
            )
    shape = (shard.documents, len(shard.tokens), str(shard.tokens.dtype))
    if shape != (entry.documents, entry.tokens, manifest.token_dtype):
        raise CorpusError(
            f"{path}: {shape[0]} documents and {shape[1]} {shape[2]} tokens, the manifest says {entry.documents} "
            f"and {entry.tokens} {manifest.token_dtype}; restore the shard or prepare the corpus again elsewhere"
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

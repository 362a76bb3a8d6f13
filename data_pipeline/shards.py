"""One shard: an Arrow IPC file with one uncompressed record batch, one row a document, read by memory mapping.

Columns: `tokens` list<uint16|uint32> (the document's ids and, last, the end-of-document id that the writer appends),
`document_hash` uint64 (xxh3-64 of the UTF-8 text), `text_bytes` uint32 (length of the UTF-8 text). The schema metadata
repeats what the shard belongs to, so that a stray file is recognisable.
"""

from __future__ import annotations

import hashlib
import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from data_pipeline.errors import CorpusError

SHARD_FORMAT_VERSION = 1
# A damaged byte is found to within one block, and a reader of a range can check what it fetched.
BLOCK_BYTES = 4 * 1024 * 1024
# Hashed at once by all hashes, and read again and again into the same memory: stays in the processor's cache.
HASHED_BYTES = 256 * 1024
# Arrow's list offsets are int32.
MAX_TOKENS = 2**31 - 2


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 when every id below `vocab_size` fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


@dataclass(frozen=True)
class FileHashes:
    """Size and checksums of a file, all from one pass."""

    bytes: int
    sha256: str
    xxh3_128: str
    # xxh3-64 of each BLOCK_BYTES of the file, in order.
    xxh3_64_blocks: list[str]


class _Hasher:
    def __init__(self, with_sha256: bool = True):
        self._sha256 = hashlib.sha256() if with_sha256 else None
        self._xxh3 = xxhash.xxh3_128()
        self._block = xxhash.xxh3_64()
        self._block_fill = 0
        self._blocks: list[str] = []
        self._bytes = 0

    def update(self, data: memoryview) -> None:
        self._bytes += len(data)
        while len(data):
            part = data[: min(HASHED_BYTES, BLOCK_BYTES - self._block_fill)]
            if self._sha256:
                self._sha256.update(part)
            self._xxh3.update(part)
            self._block.update(part)
            self._block_fill += len(part)
            data = data[len(part) :]
            if self._block_fill == BLOCK_BYTES:
                self._close_block()

    def _close_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block = xxhash.xxh3_64()
        self._block_fill = 0

    def result(self) -> FileHashes:
        if self._block_fill:
            self._close_block()
        sha256 = self._sha256.hexdigest() if self._sha256 else ""
        return FileHashes(self._bytes, sha256, self._xxh3.hexdigest(), self._blocks)


def hash_file(
    path: Path,
    with_sha256: bool = True,
    on_bytes: Callable[[int], None] | None = None,
    places: tuple[int, int] | None = None,
) -> FileHashes:
    """Checksums of a file as it is on disk now, or of its bytes from places[0] up to places[1].

    Without sha256 (left empty) it runs about ten times faster.
    """
    hasher = _Hasher(with_sha256)
    buffer = memoryview(bytearray(HASHED_BYTES))
    with open(path, "rb", buffering=0) as file:
        start, end = places or (0, sys.maxsize)
        file.seek(start)
        while count := file.readinto(buffer[: end - start]):
            start += count
            hasher.update(buffer[:count])
            if on_bytes:
                on_bytes(count)
    return hasher.result()


def write_atomically(path: Path, write: Callable[[Callable[[bytes], object]], None]) -> FileHashes:
    """Create `path` so that at any kill it is absent, as before, or complete; returns its checksums.

    `write` gets a function that takes bytes. The data go to a file of their own, `<path>.<random>.partial`, are flushed
    to the disk, then renamed: processes that write the same path do not meet.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")
    hasher = _Hasher()
    try:
        with open(partial, "wb") as file:

            def put(data: bytes) -> int:
                view = memoryview(data)
                hasher.update(view)
                return file.write(view)

            write(put)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        # Gives the space back where there was too little of it.
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return hasher.result()


def sync_folder(folder: Path) -> None:
    """Make renames and new names inside `folder` survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Sink:
    """What pyarrow needs of a writable file."""

    closed = False

    def __init__(self, put: Callable[[bytes], object]):
        self.write = put

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class ShardBuilder:
    """Documents collected in memory until they are written as one shard."""

    def __init__(self, vocab_size: int, eod_id: int):
        self._vocab_size = vocab_size
        self._eod = np.array([eod_id], dtype=token_dtype(vocab_size))
        self._parts: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._hashes: list[int] = []
        self._text_bytes: list[int] = []
        self.tokens = 0

    def _check(self, ids: np.ndarray) -> None:
        lowest = int(ids.min()) if ids.size and ids.dtype.kind == "i" else 0
        if ids.size and (lowest < 0 or int(ids.max()) >= self._vocab_size):
            raise CorpusError(f"the tokenizer gave an id outside its vocabulary of {self._vocab_size}")

    @property
    def documents(self) -> int:
        return len(self._lengths)

    @property
    def text_bytes(self) -> int:
        return sum(self._text_bytes)

    @property
    def token_bytes(self) -> int:
        return self.tokens * self._eod.itemsize

    def add(self, ids: np.ndarray, text: bytes) -> None:
        """Append a document: its token ids [n] without the end-of-document id, and its UTF-8 text.

        Ids of the shard's own type are kept as a view and checked when the shard is written. Raises CorpusError.
        """
        if ids.dtype != self._eod.dtype:
            self._check(ids)
            ids = ids.astype(self._eod.dtype)
        self._parts += (ids, self._eod)
        self._lengths.append(len(ids) + 1)
        self._hashes.append(xxhash.xxh3_64_intdigest(text))
        self._text_bytes.append(len(text))
        self.tokens += len(ids) + 1

    def write(self, path: Path, metadata: dict[str, str]) -> FileHashes:
        """Write the shard atomically with `metadata` in its schema. Raises CorpusError for an id that cannot be."""
        offsets = np.concatenate(([0], np.cumsum(self._lengths, dtype=np.int64))).astype(np.int32)
        tokens = np.concatenate(self._parts)
        self._check(tokens)
        columns = {
            "tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens)),
            "document_hash": pa.array(np.array(self._hashes, dtype=np.uint64)),
            "text_bytes": pa.array(np.array(self._text_bytes, dtype=np.uint32)),
        }
        schema = pa.schema(
            [pa.field(name, column.type, nullable=False) for name, column in columns.items()],
            metadata={"shard_format_version": str(SHARD_FORMAT_VERSION), **metadata},
        )
        batch = pa.RecordBatch.from_arrays(list(columns.values()), schema=schema)

        def write(put: Callable[[bytes], object]) -> None:
            with pa.ipc.new_file(pa.PythonFile(_Sink(put), mode="w"), schema) as writer:
                writer.write_batch(batch)

        return write_atomically(path, write)


class Shard:
    """A shard on disk, memory-mapped: nothing is read before it is used.

    `tokens`: uint16|uint32 [T], all documents one after another. `offsets`: int32 [documents + 1]; document d is
    tokens[offsets[d] : offsets[d + 1]] and its last token is the end-of-document id.
    """

    def __init__(self, path: Path):
        try:
            self._map = pa.memory_map(str(path), "r")
            self._data = self._map.read_buffer()
            reader = pa.ipc.open_file(self._data)
            if reader.num_record_batches != 1:
                raise pa.ArrowInvalid(f"{reader.num_record_batches} record batches instead of 1")
            batch = reader.get_batch(0)
            self.metadata = {k.decode(): v.decode() for k, v in (reader.schema.metadata or {}).items()}
            column = self._column = batch.column("tokens")
            self.tokens = column.values.to_numpy(zero_copy_only=True)
            self.offsets = column.offsets.to_numpy(zero_copy_only=True)
            self.document_hashes = batch.column("document_hash").to_numpy(zero_copy_only=True)
            self.text_bytes = batch.column("text_bytes").to_numpy(zero_copy_only=True)
        except FileNotFoundError:
            raise CorpusError(f"{path}: the shard is missing; restore it or prepare the corpus again") from None
        except (pa.ArrowException, OSError, KeyError, AttributeError, UnicodeDecodeError) as error:
            raise CorpusError(f"{path}: not a readable shard ({error}); prepare the corpus again") from None

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    def column_places(self) -> tuple[int, int]:
        """Byte offsets in the file of `tokens` and of `offsets`."""
        _, offsets, _, tokens = self._column.buffers()
        return tokens.address - self._data.address, offsets.address - self._data.address

    def problems(self, vocab_size: int, eod_id: int) -> list[str]:
        """Structural faults: offsets that do not rise, ids outside the vocabulary, documents without their end."""
        problems = []
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens) or (np.diff(self.offsets) < 2).any():
            return ["document offsets do not rise from 0 to the number of tokens"]
        if self.tokens.dtype != token_dtype(vocab_size):
            problems.append(f"token ids are {self.tokens.dtype}, not {token_dtype(vocab_size)}")
        if len(self.tokens) and int(self.tokens.max()) >= vocab_size:
            place = int(self.tokens.argmax())
            problems.append(f"token {place}: id {int(self.tokens[place])} is outside the vocabulary of {vocab_size}")
        ends = self.offsets[1:] - 1
        if len(open_ended := np.flatnonzero(self.tokens[ends] != eod_id)):
            problems.append(f"document {open_ended[0]} does not end with the end-of-document id {eod_id}")
        elif len(found := np.flatnonzero(self.tokens == eod_id)) != self.documents:
            within = np.setdiff1d(found, ends)[0]
            document = int(np.searchsorted(self.offsets, within, side="right")) - 1
            problems.append(
                f"document {document} holds the end-of-document id {eod_id} before its end, at token {within}"
            )
        return problems

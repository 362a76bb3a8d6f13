"""One shard: an Arrow IPC file with one uncompressed record batch, one row a document, read by memory mapping.

Columns: `tokens` list<uint16|uint32> (the document's ids and, last, the end-of-document id that the writer appends),
`document_hash` uint64 (xxh3-64 of the UTF-8 text), `text_bytes` uint32 (length of the UTF-8 text). The schema metadata
repeats what the shard belongs to, so that a stray file is recognisable.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from conf.problems import other_format
from data_pipeline.corpus.files import FileHashes, Put, write_atomically
from data_pipeline.errors import OUT_OF_RESOURCES, CorpusError, ReadingError
from data_pipeline.tokenizing.tokenizer import token_dtype

SHARD_FORMAT_VERSION = 1
_FORMAT_KEY = "shard_format_version"
# Arrow's list offsets are int32.
MAX_TOKENS = 2**31 - 2


class _Sink:
    """What pyarrow needs of a writable file."""

    closed = False

    def __init__(self, put: Put):
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
            metadata={_FORMAT_KEY: str(SHARD_FORMAT_VERSION), **metadata},
        )
        batch = pa.RecordBatch.from_arrays(list(columns.values()), schema=schema)

        def write(put: Put) -> None:
            with pa.ipc.new_file(pa.PythonFile(_Sink(put), mode="w"), schema) as writer:
                writer.write_batch(batch)

        return write_atomically(path, write)


def _refuse_other_format(path: str | Path, metadata: Mapping[str, str]) -> None:
    found = metadata.get(_FORMAT_KEY, SHARD_FORMAT_VERSION)
    if problem := other_format(path, found, SHARD_FORMAT_VERSION, _FORMAT_KEY):
        raise CorpusError(problem)


class Shard:
    """A shard on disk, memory-mapped: nothing is read before it is used.

    `tokens`: uint16|uint32 [T], all documents one after another. `offsets`: int32 [documents + 1]; document d is
    tokens[offsets[d] : offsets[d + 1]] and its last token is the end-of-document id.
    """

    def __init__(self, path: str | Path):
        try:
            self._map = pa.memory_map(str(path), "r")
            self._data = self._map.read_buffer()
            reader = pa.ipc.open_file(self._data)
            if reader.num_record_batches != 1:
                raise pa.ArrowInvalid(f"{reader.num_record_batches} record batches instead of 1")
            batch = reader.get_batch(0)
            # Buffers that do not reach as far as the batch says.
            batch.validate()
            self.metadata = {k.decode(): v.decode() for k, v in (reader.schema.metadata or {}).items()}
            _refuse_other_format(path, self.metadata)
            column = self._column = batch.column("tokens")
            # Views, as Arrow's own to_numpy makes them, which imports pandas for it (half a second).
            self.tokens = np.from_dlpack(column.values)
            self.offsets = np.from_dlpack(column.offsets)
            self.document_hashes = np.from_dlpack(batch.column("document_hash"))
            self.text_bytes = np.from_dlpack(batch.column("text_bytes"))
        except FileNotFoundError:
            raise CorpusError(
                f"{path}: the shard is missing; restore it or prepare the corpus again elsewhere"
            ) from None
        except OSError as error:
            kind = ReadingError if error.errno in OUT_OF_RESOURCES else CorpusError
            raise kind(f"{path}: not a readable shard ({error}); prepare the corpus again elsewhere") from None
        except (pa.ArrowException, KeyError, AttributeError, UnicodeDecodeError) as error:
            raise CorpusError(f"{path}: not a readable shard ({error}); prepare the corpus again elsewhere") from None

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

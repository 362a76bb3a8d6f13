"""`shards.arrow`: the table of all shards of a corpus, a row a shard, memory-mapped: a million rows cost nothing.

An Arrow IPC file with one uncompressed record batch. Columns: file, split, source (the latter two dictionary-encoded),
unit, documents, tokens, text_bytes, bytes (int64), sha256 (32 bytes), xxh3_128 (16 bytes), xxh3_64_blocks (binary, 8
bytes for each block of the file, in order). Row order is the order in which shards are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import SupportsIndex, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from conf.named_files import FOREIGN_NAME, unsafe_file
from data_pipeline.corpus.files import hash_file, path_in, write_whole
from data_pipeline.errors import CorpusError

MANIFEST_FILE = "manifest.json"
SHARD_TABLE_FILE = "shards.arrow"
SHARDS_FOLDER = "shards"
_ADVICE = "restore the file or prepare the corpus again elsewhere"
_COUNTS = ("documents", "tokens", "text_bytes")
_LABEL = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("split", _LABEL, nullable=False),
        pa.field("source", _LABEL, nullable=False),
        *(pa.field(name, pa.int64(), nullable=False) for name in ("unit", *_COUNTS, "bytes")),
        pa.field("sha256", pa.binary(32), nullable=False),
        pa.field("xxh3_128", pa.binary(16), nullable=False),
        pa.field("xxh3_64_blocks", pa.binary(), nullable=False),
    ]
)


@dataclass(frozen=True)
class ShardEntry:
    """One shard: what it holds and the checksums of its file (hex)."""

    file: str
    split: str
    source: str
    unit: int
    documents: int
    tokens: int
    text_bytes: int
    bytes: int
    sha256: str
    xxh3_128: str
    xxh3_64_blocks: list[str]


@dataclass(frozen=True)
class ShardTableEntry:
    """What the manifest records of the table's file."""

    file: str
    shards: int
    bytes: int
    sha256: str
    xxh3_128: str


def shard_path(folder: Path, file: str) -> Path:
    """Where the shard `file` of the corpus in `folder` lies. Raises CorpusError as `path_in` does.

    It may be a link to a shard of another corpus, as `--link symbolic` makes it.
    """
    return path_in(folder, file, SHARD_TABLE_FILE, "file", _is_of_a_corpus)


def _is_of_a_corpus(path: str) -> bool:
    return any(
        parent.name == SHARDS_FOLDER and (parent.parent / MANIFEST_FILE).is_file() for parent in Path(path).parents
    )


class ShardTable(Sequence[ShardEntry]):
    """The rows as `ShardEntry` (made one at a time when asked for), and the columns as arrays.

    documents, tokens, text_bytes, bytes: int64 [shards], views of the file. `from_entries` builds one, `read` opens
    one.
    """

    def __init__(self, batch: pa.RecordBatch, entry: ShardTableEntry, data: pa.Buffer):
        self.entry = entry
        self._batch = batch
        self._data = data
        self.documents, self.tokens, self.text_bytes, self.bytes = (
            # Without Arrow's to_numpy, as in shards.py.
            np.from_dlpack(batch.column(name))
            for name in (*_COUNTS, "bytes")
        )

    @staticmethod
    def from_entries(entries: Iterable[ShardEntry]) -> ShardTable:
        """The table of `entries`, in their order, in memory."""
        entries = list(entries)
        columns = {name: [getattr(entry, name) for entry in entries] for name in SCHEMA.names}
        columns |= {name: [bytes.fromhex(x) for x in columns[name]] for name in ("sha256", "xxh3_128")}
        columns["xxh3_64_blocks"] = [bytes.fromhex("".join(blocks)) for blocks in columns["xxh3_64_blocks"]]
        columns |= {name: _encode_labels(columns[name]) for name in ("split", "source")}
        arrays = [pa.array(columns[f.name], f.type) if f.type != _LABEL else columns[f.name] for f in SCHEMA]
        return ShardTable.from_batch(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))

    @staticmethod
    def from_batch(batch: pa.RecordBatch) -> ShardTable:
        """The table of a record batch that has the columns of the file."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_batch(batch)
        data = sink.getvalue()
        sha256, xxh3 = hashlib.sha256(data).hexdigest(), xxhash.xxh3_128_hexdigest(data)
        entry = ShardTableEntry(SHARD_TABLE_FILE, batch.num_rows, data.size, sha256, xxh3)
        return ShardTable(_only_batch(data), entry, data)

    @staticmethod
    def read(folder: Path, entry: ShardTableEntry) -> ShardTable:
        """Map the table in `folder` after comparing it with `entry`. Raises CorpusError naming the file."""
        path = path_in(folder, entry.file, MANIFEST_FILE, "shards.file")
        if not path.is_file():
            raise CorpusError(f"{path}: the table of shards is missing; {_ADVICE}")
        # Read, not mapped, so that the pages do not stay in the process.
        found = hash_file(path, with_sha256=False)
        if (found.bytes, found.xxh3_128) != (entry.bytes, entry.xxh3_128):
            raise CorpusError(
                f"{path}: altered after it was written ({found.bytes} bytes, xxh3 {found.xxh3_128[:12]}; the manifest "
                f"says {entry.bytes} bytes, {entry.xxh3_128[:12]}); {_ADVICE}"
            )
        try:
            data = pa.memory_map(str(path), "r").read_buffer()
            table = ShardTable(_only_batch(data), entry, data)
            is_foreign = pc.match_substring_regex(table._batch.column("file"), FOREIGN_NAME)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise CorpusError(f"{path}: not a table of shards ({error}); {_ADVICE}") from None
        if len(table) != entry.shards:
            raise CorpusError(f"{path}: {len(table)} rows, the manifest says {entry.shards} shards; {_ADVICE}")
        # All names at once: there may be a million.
        if (row := pc.index(pc.fill_null(is_foreign, True), True).as_py()) >= 0:
            raise CorpusError(unsafe_file(path, f"file of row {row}", table.file(row)))
        return table

    def write(self, folder: Path) -> None:
        """Write the table's file into `folder` atomically."""
        write_whole(path_in(folder, self.entry.file, MANIFEST_FILE, "shards.file"), memoryview(self._data))

    def __len__(self) -> int:
        return self._batch.num_rows

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and other.entry == self.entry

    def __hash__(self) -> int:
        return hash(self.entry)

    def __iter__(self) -> Iterator[ShardEntry]:
        return (self[row] for row in range(len(self)))

    @overload
    def __getitem__(self, row: SupportsIndex) -> ShardEntry: ...

    @overload
    def __getitem__(self, row: slice) -> list[ShardEntry]: ...

    def __getitem__(self, row: SupportsIndex | slice) -> ShardEntry | list[ShardEntry]:
        if isinstance(row, slice):
            return [self[r] for r in range(*row.indices(len(self)))]
        number = int(row)
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)} shards")
        number %= len(self)
        values = {name: self._batch.column(name)[number].as_py() for name in SCHEMA.names}
        values |= {name: values[name].hex() for name in ("sha256", "xxh3_128")}
        blocks = values["xxh3_64_blocks"].hex()
        values["xxh3_64_blocks"] = [blocks[n : n + 16] for n in range(0, len(blocks), 16)]
        return ShardEntry(**values)

    def file(self, row: int) -> str:
        """Name of the file of one shard, in the corpus folder."""
        return self._batch.column("file")[int(row)].as_py()

    def sha256(self, row: int) -> bytes:
        """sha256 of one shard's file, 32 bytes."""
        return self._batch.column("sha256")[int(row)].as_py()

    def block_hashes(self, row: int) -> bytes:
        """xxh3-64 digests of the blocks of one shard's file, 8 bytes each."""
        return self._batch.column("xxh3_64_blocks")[int(row)].as_py()

    @cached_property
    def _labels(self) -> tuple[list[tuple[str, str]], np.ndarray]:
        """The (split, source) pairs that occur, sorted, and the number of its pair for each row."""
        split, source = self._batch.column("split"), self._batch.column("source")
        splits, sources = split.dictionary.to_pylist(), source.dictionary.to_pylist()
        codes = np.from_dlpack(split.indices).astype(np.int64) * len(sources) + np.from_dlpack(source.indices)
        found, numbers = np.unique(codes, return_inverse=True)
        pairs = [(splits[code // len(sources)], sources[code % len(sources)]) for code in found.tolist()]
        order = sorted(range(len(pairs)), key=pairs.__getitem__)
        rank = np.empty(len(pairs), dtype=np.int32)
        rank[order] = np.arange(len(pairs), dtype=np.int32)
        return [pairs[place] for place in order], rank[numbers]

    def rows(self, split: str, source: str) -> np.ndarray:
        """Row numbers, int64, of the shards of one source of a split, in reading order."""
        pairs, numbers = self._labels
        return np.flatnonzero(numbers == pairs.index((split, source)))

    def sums(self) -> dict[str, dict[str, dict[str, int]]]:
        """split -> source -> {"documents", "tokens", "text_bytes"}."""
        pairs, numbers = self._labels
        splits: dict[str, dict[str, dict[str, int]]] = {}
        for number, (split, source) in enumerate(pairs):
            mine = numbers == number
            splits.setdefault(split, {})[source] = {name: int(getattr(self, name)[mine].sum()) for name in _COUNTS}
        return splits


def _encode_labels(labels: list[str]) -> pa.DictionaryArray:
    values = sorted(set(labels))
    numbers = {label: number for number, label in enumerate(values)}
    indices = pa.array([numbers[label] for label in labels], pa.int32())
    return pa.DictionaryArray.from_arrays(indices, pa.array(values, pa.string()))


def _only_batch(data: pa.Buffer) -> pa.RecordBatch:
    reader = pa.ipc.open_file(data)
    if reader.num_record_batches != 1 or not reader.schema.equals(SCHEMA):
        raise pa.ArrowInvalid("its columns are not those of a table of shards")
    batch = reader.get_batch(0)
    # Offsets that lead out of the file, texts that are none, numbers of labels that there are not.
    batch.validate(full=True)
    return batch

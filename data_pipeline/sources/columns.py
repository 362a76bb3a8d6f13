"""Records of columnar files, Parquet and Arrow, a batch at a time and only the columns that are needed.

Both formats can hold a value once that many rows have. So what reading takes is reckoned from headers beforehand, and
rows become Python objects one by one where a batch might be larger than its bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from data_pipeline.errors import PrepareError
from data_pipeline.sources.archives import MemoryLimitError
from data_pipeline.sources.arrow_messages import batch_sizes
from data_pipeline.sources.config import DataConfig
from data_pipeline.sources.fields import columns_of
from data_pipeline.sources.parquet_pages import column_pages, first_byte

# What reading a damaged file raises; the last where the names of its columns are damaged.
DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
ROWS = 256
# Ends a complete Arrow stream: a continuation marker and the length 0.
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
# What Arrow takes, measured: a batch is put together from parts, and memory of the one before is kept.
BATCH_COPIES = 3
# Rows with more bytes become Python objects one by one.
ROWS_BYTES = 8 << 20
EMPTY_LIST = pa.list_(pa.null())
# Without these a reader holds whole row groups as they are on disk.
open_parquet = functools.partial(pa.parquet.ParquetFile, pre_buffer=False, buffer_size=1 << 20)


@dataclass(frozen=True)
class OversizedText:
    """Stands for a record whose text is above `data.max_record_bytes`. `characters`: its length."""

    characters: int


@dataclass(frozen=True)
class LostRows:
    """Stands for rows that cannot be read in the memory that `data.max_reader_bytes` allows."""

    rows: int
    error: MemoryLimitError


# A record with the columns' names as fields, or why there is none.
Record = dict[str, Any] | UnicodeDecodeError | OversizedText | LostRows


@dataclass(frozen=True)
class RowGroups:
    """Consecutive row groups of a Parquet file, `first` to `end` - 1.

    `start_byte`, `end_byte`: their part of the file; those of all runs of row groups cover the file once.
    """

    first: int
    end: int
    start_byte: int
    end_byte: int

    @property
    def bytes(self) -> int:
        return self.end_byte - self.start_byte


def cut_row_groups(path: Path, part_bytes: int) -> list[RowGroups]:
    """The row groups of a Parquet file in runs of at least `part_bytes` each, but for the last.

    Empty where the file cannot be cut: its end is damaged, or its row groups do not lie one after another.
    """
    try:
        with pa.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            starts = [min(map(first_byte, map(group.column, range(group.num_columns)))) for group in groups]
    except DAMAGE:
        return []
    if len(starts) < 2 or any(a >= b for a, b in zip(starts, starts[1:], strict=False)):
        return []
    size = path.stat().st_size
    runs: list[RowGroups] = []
    first, start_byte = 0, 0
    for end, end_byte in enumerate([*starts[1:], size], 1):
        if end_byte - start_byte >= part_bytes or end == len(starts):
            runs.append(RowGroups(first, end, start_byte, end_byte))
            first, start_byte = end, end_byte
    return runs


def first_row(path: Path, part: RowGroups) -> int:
    """Rows of a Parquet file before `part`. Raises what DAMAGE lists."""
    with pa.parquet.ParquetFile(path) as file:
        return sum(file.metadata.row_group(number).num_rows for number in range(part.first))


def read_parquet(
    path: Path, name: str, config: DataConfig, part: RowGroups | None = None
) -> Iterator[tuple[Iterator[Record], float]]:
    """(records, share read so far) of a Parquet file or of a part of it. Raises PrepareError and what DAMAGE lists."""
    with open(path, "rb") as raw, open_parquet(path, page_checksum_verification=True) as file:
        leaves = _leaves(file, _wanted(name, file.schema_arrow.names, config), config.text_field)
        paths = [file.schema.column(leaf).path for leaf in leaves]
        groups = range(file.num_row_groups) if part is None else range(part.first, part.end)
        sizes = [file.metadata.row_group(number).num_rows for number in groups]
        total = max(1, sum(sizes))
        rows = 0
        for group, size in zip(groups, sizes, strict=True):
            batch_size, error = _batch_size(file, raw.fileno(), group, leaves, config.max_reader_bytes)
            if error is not None:
                rows += size
                yield iter([LostRows(size, error)]), rows / total
                continue
            for batch in file.iter_batches(batch_size=batch_size, row_groups=[group], columns=paths):
                rows += batch.num_rows
                yield _records(batch, config), rows / total
                # Gone before the next one is decoded.
                del batch


def _leaves(file: pa.parquet.ParquetFile, wanted: list[str], text_field: str | None) -> list[int]:
    """The columns of a Parquet file below these names, in which there are no labels in lists to look for."""
    leaves = []
    for number in range(len(file.schema)):
        leaf = file.schema.column(number)
        names = [name for name in wanted if f"{leaf.path}.".startswith(f"{name}.")]
        if text_field in names or names and not leaf.max_repetition_level:
            leaves.append(number)
    return leaves


def _batch_size(
    file: pa.parquet.ParquetFile, descriptor: int, group: int, leaves: list[int], allowed: int
) -> tuple[int, MemoryLimitError | None]:
    """How many rows of a row group to read at a time, or why not even one."""
    columns = column_pages(file, descriptor, group, leaves)
    held = sum(column.held_bytes() for column in columns)
    rows = ROWS
    while (needed := held + BATCH_COPIES * sum(column.batch_bytes(rows) for column in columns)) > allowed:
        if rows == 1:
            return 1, MemoryLimitError(f"row group {group}", needed, allowed)
        rows //= 2
    return rows, None


def read_arrow(path: Path, name: str, config: DataConfig) -> Iterator[tuple[Iterator[Record], float]]:
    """The same of an Arrow file, in the file format or in the stream format (which `datasets` saves).

    Raises MemoryLimitError where the dictionaries that all batches need take too much.
    """
    with pa.memory_map(str(path)) as file:
        reader = _open_arrow(file)
        wanted = _wanted(name, reader.schema.names, config)
        share = 0.0
        for batch in _arrow_batches(file, reader, config.max_reader_bytes):
            if isinstance(batch, LostRows):
                yield iter([batch]), share
                continue
            batch = batch.select(wanted)
            _check(batch)
            for start in range(0, batch.num_rows, ROWS):
                yield _records(batch.slice(start, ROWS), config), share
            share = file.tell() / file.size()


def _open_arrow(file: pa.MemoryMappedFile) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
    try:
        return pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(max(0, file.size() - len(END_OF_STREAM)))
        if file.read() != END_OF_STREAM:
            raise pa.ArrowInvalid("neither a whole Arrow file nor a whole stream: its end is missing") from None
        file.seek(0)
        return pa.ipc.open_stream(file)


def _arrow_batches(
    file: pa.MemoryMappedFile, reader: pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader, allowed: int
) -> Iterator[pa.RecordBatch | LostRows]:
    is_stream = isinstance(reader, pa.ipc.RecordBatchStreamReader)
    sizes = batch_sizes(file, is_stream)
    dictionaries = sum(size.bytes for size in sizes if size.is_dictionary)
    if dictionaries > allowed:
        raise MemoryLimitError("its dictionaries", dictionaries, allowed)
    for number, size in enumerate(size for size in sizes if not size.is_dictionary):
        needed = dictionaries + size.bytes
        if needed <= allowed:
            yield reader.read_next_batch() if is_stream else reader.get_batch(number)
            continue
        if is_stream:
            file.seek(size.end)
        yield LostRows(size.rows, MemoryLimitError(f"record batch {number}", needed, allowed))


def first_record(path: Path, kind: str, max_reader_bytes: int) -> dict[str, Any] | None:
    """The first row of a Parquet or Arrow file (`kind`), if it has one that can be read: lists are left empty.

    Raises MemoryLimitError and what DAMAGE lists.
    """
    if kind == "parquet":
        with open(path, "rb") as raw, open_parquet(path) as file:
            names = file.schema_arrow.names
            leaves = _leaves(file, names, None)
            group = next((n for n in range(file.num_row_groups) if file.metadata.row_group(n).num_rows), None)
            if group is None:
                return None
            _, error = _batch_size(file, raw.fileno(), group, leaves, max_reader_bytes)
            if error is not None:
                raise error
            paths = [file.schema.column(leaf).path for leaf in leaves]
            rows = next(file.iter_batches(batch_size=1, row_groups=[group], columns=paths), None)
    else:
        with pa.memory_map(str(path)) as source:
            reader = _open_arrow(source)
            names = reader.schema.names
            rows = next(_arrow_batches(source, reader, max_reader_bytes), None)
    if not isinstance(rows, pa.RecordBatch) or not rows.num_rows:
        return None
    return dict.fromkeys(names, []) | _without_lists(rows.slice(0, 1)).to_pylist()[0]


def _wanted(name: str, names: list[str], config: DataConfig) -> list[str]:
    if config.text_field not in names:
        raise PrepareError(f"{name}: no column '{config.text_field}', only {', '.join(names)}; set data.text_field")
    wanted = [config.text_field, *columns_of(config.source_field or "", names)]
    return list(dict.fromkeys(wanted))


def _check(batch: pa.RecordBatch) -> None:
    """Refuse offsets that point outside a damaged batch. Text that is not UTF-8 is reported record by record."""
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise


def _records(batch: pa.RecordBatch, config: DataConfig) -> Iterator[Record]:
    batch = _without_lists(batch)
    if batch.nbytes <= ROWS_BYTES and all(_holds_its_values(field.type) for field in batch.schema):
        try:
            return iter(batch.to_pylist())
        except UnicodeDecodeError:
            pass
    return (_record(batch.slice(row, 1), config) for row in range(batch.num_rows))


def _record(row: pa.RecordBatch, config: DataConfig) -> Record:
    for name, column in zip(row.schema.names, row.columns, strict=True):
        if name == config.text_field and (characters := _excess(column, config.max_record_bytes)):
            return OversizedText(characters)
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return error


def _excess(value: pa.Array, allowed: int) -> int:
    """The length of one text in characters where that is more than is allowed; else 0."""
    if not (pa.types.is_string(value.type) or pa.types.is_large_string(value.type)):
        value = _plain(value[0])
    # A scalar of a plain text would be a copy of it.
    if value is None or (pa.compute.binary_length(value)[0].as_py() or 0) <= allowed:
        return 0
    characters = pa.compute.utf8_length(value)[0].as_py()
    return characters if characters > allowed else 0


def _plain(value: pa.Scalar) -> pa.Array | None:
    """A text that lies in a dictionary, in a run or elsewhere; None for what is no text."""
    while isinstance(value, pa.DictionaryScalar | pa.RunEndEncodedScalar | pa.ExtensionScalar):
        value = value.value
    data = value.as_buffer() if isinstance(value, pa.BinaryScalar) else None
    offsets = np.array([0, data.size if data else 0], dtype=np.int64)
    return None if data is None else pa.LargeStringArray.from_buffers(1, pa.py_buffer(offsets), data)


def _holds_its_values(kind: pa.DataType) -> bool:
    """Whether an array of this type has as many bytes as its values have."""
    types = pa.types
    if types.is_struct(kind):
        return all(_holds_its_values(field.type) for field in kind)
    binary = (
        types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)
    )
    return binary or types.is_primitive(kind) or types.is_decimal(kind) or types.is_null(kind) or kind == EMPTY_LIST


def _without_lists(batch: pa.RecordBatch) -> pa.RecordBatch:
    """`batch` with nothing in its lists, where neither texts nor labels are looked for: one row can have billions."""
    emptied = [_emptied(column) for column in batch.columns]
    return pa.RecordBatch.from_arrays(emptied, names=batch.schema.names)


def _emptied(array: pa.Array) -> pa.Array:
    kind = array.type
    if pa.types.is_struct(kind):
        fields = [_emptied(array.field(number)) for number in range(kind.num_fields)]
        names = [field.name for field in kind]
        return pa.StructArray.from_arrays(fields, names=names, mask=array.is_null()) if fields else array
    if _is_list(kind.value_type if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind) else kind):
        return pa.array([None if null else [] for null in array.is_null().to_pylist()], EMPTY_LIST)
    return array


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_map(kind)
    return lists or types.is_list_view(kind) or types.is_large_list_view(kind)

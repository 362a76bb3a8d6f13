"""Records of columnar files, Parquet and Arrow, a batch at a time and only the columns that are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from data_pipeline.errors import PrepareError
from data_pipeline.sources.config import DataConfig
from data_pipeline.sources.fields import columns_of

# What reading a damaged file raises; the last where the names of its columns are damaged.
DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
ROWS = 256
# Ends a complete Arrow stream: a continuation marker and the length 0.
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
# A record with the columns' names as fields, or why there is none.
Record = dict[str, Any] | UnicodeDecodeError


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
            starts = [min(map(_first_byte, map(group.column, range(group.num_columns)))) for group in groups]
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


def _first_byte(chunk: pa.parquet.ColumnChunkMetaData) -> int:
    return min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)


def first_row(path: Path, part: RowGroups) -> int:
    """Rows of a Parquet file before `part`. Raises what DAMAGE lists."""
    with pa.parquet.ParquetFile(path) as file:
        return sum(file.metadata.row_group(number).num_rows for number in range(part.first))


def read_parquet(
    path: Path, name: str, config: DataConfig, part: RowGroups | None = None
) -> Iterator[tuple[list[Record], float]]:
    """(records, share read so far) of a Parquet file or of a part of it. Raises PrepareError and what DAMAGE lists."""
    with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        wanted = _wanted(name, file.schema_arrow.names, config)
        groups = range(file.num_row_groups) if part is None else range(part.first, part.end)
        total = max(1, sum(file.metadata.row_group(number).num_rows for number in groups))
        rows = 0
        for batch in file.iter_batches(batch_size=ROWS, row_groups=groups, columns=wanted):
            rows += batch.num_rows
            yield _records(batch), rows / total


def read_arrow(path: Path, name: str, config: DataConfig) -> Iterator[tuple[list[Record], float]]:
    """The same of an Arrow file, in the file format or in the stream format (which `datasets` saves)."""
    with pa.memory_map(str(path)) as file:
        schema, batches = _arrow_batches(file)
        wanted = _wanted(name, schema.names, config)
        share = 0.0
        for batch in batches:
            _check(batch.select(wanted))
            for start in range(0, batch.num_rows, ROWS):
                yield _records(batch.select(wanted).slice(start, ROWS)), share
            share = file.tell() / file.size()


def _arrow_batches(file: pa.MemoryMappedFile) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    try:
        reader = pa.ipc.open_file(file)
        return reader.schema, (reader.get_batch(number) for number in range(reader.num_record_batches))
    except pa.ArrowInvalid:
        file.seek(max(0, file.size() - len(END_OF_STREAM)))
        if file.read() != END_OF_STREAM:
            raise pa.ArrowInvalid("neither a whole Arrow file nor a whole stream: its end is missing") from None
        file.seek(0)
        stream = pa.ipc.open_stream(file)
        return stream.schema, iter(stream)


def first_record(path: Path, kind: str) -> dict[str, Any] | None:
    """The first row of a Parquet or Arrow file (`kind`) with all columns, if it has one. Raises what DAMAGE lists."""
    if kind == "parquet":
        with pa.parquet.ParquetFile(path) as file:
            rows = next(file.iter_batches(batch_size=1), None)
    else:
        with pa.memory_map(str(path)) as source:
            rows = next(_arrow_batches(source)[1], None)
    if rows is None or not rows.num_rows:
        return None
    return rows.slice(0, 1).to_pylist()[0]


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


def _records(batch: pa.RecordBatch) -> list[Record]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [_record(batch, row) for row in range(batch.num_rows)]


def _record(batch: pa.RecordBatch, row: int) -> Record:
    try:
        return batch.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return error

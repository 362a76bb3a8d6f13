"""How much memory a row group of a Parquet file takes, from the headers of its pages, before any page is decoded.

The file's footer does not say it: a dictionary page holds a value once that thousands of rows have, and what the footer
says of sizes is not what a decoder goes by. Page headers are structs in Thrift's compact protocol (parquet-format,
parquet.thrift); the decoder takes as much memory as they say.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet

# Bytes of a page header that are read first, and as many as the reader of Arrow accepts.
HEADER_BYTES = 512
MAX_HEADER_BYTES = 16 << 20
# Some old writers count the chunk of a column too short by the header of its dictionary page (PARQUET-816).
CHUNK_MARGIN = 100
# A value in a batch beside its bytes: its offset, its levels and whether it is null.
VALUE_BYTES = 16
# Numbers of fields of a PageHeader: its size, its size on disk, and the headers of data pages.
UNCOMPRESSED, COMPRESSED, DATA_PAGE, DATA_PAGE_V2 = 2, 3, 5, 8
NUM_VALUES = 1
# Where the header of a data page has the encoding of its values.
ENCODING_FIELD = {DATA_PAGE: 2, DATA_PAGE_V2: 4}
PLAIN_DICTIONARY, DELTA_BYTE_ARRAY, RLE_DICTIONARY = 2, 7, 8
# Types of Thrift's compact protocol.
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
MAX_DEPTH = 16


@dataclass(frozen=True)
class Page:
    """A data page: values, bytes (with those on disk), and bytes that any one of its values may have in a batch beyond
    its share of the page, because it repeats a value of the dictionary or the beginning of the one before."""

    values: int
    bytes: int
    repeated_bytes: int


@dataclass(frozen=True)
class ColumnPages:
    """The pages of one column of a row group, in bytes."""

    dictionary_bytes: int
    pages: list[Page]
    # Several values may be in one row.
    in_lists: bool
    # Bytes of a value that is null, where all values have the same length.
    fixed_bytes: int

    def held_bytes(self) -> int:
        """What is held beside the rows: the dictionary and a page."""
        return self.dictionary_bytes + max((page.bytes for page in self.pages), default=0)

    def batch_bytes(self, rows: int) -> int:
        """An upper bound of what `rows` consecutive rows take."""
        repeated = max((page.repeated_bytes for page in self.pages), default=0)
        values = sum(page.values for page in self.pages)
        if self.in_lists:
            return sum(page.bytes for page in self.pages) + values * (VALUE_BYTES + repeated + self.fixed_bytes)
        # Arrow makes room for all values of one length at once.
        return self._plain_bytes(rows) + rows * (VALUE_BYTES + repeated) + values * self.fixed_bytes

    def _plain_bytes(self, rows: int) -> int:
        """The most bytes of pages of which a run of `rows` rows can have something."""
        most, total, inside, first = 0, 0, 0, 0
        for last, page in enumerate(self.pages):
            total += page.bytes
            # A run that begins with the last row of the first page and ends in this one has all rows between.
            if last > first + 1:
                inside += self.pages[last - 1].values
            while last > first + 1 and inside + 2 > rows:
                total -= self.pages[first].bytes
                first += 1
                inside -= self.pages[first].values if last > first else 0
            most = max(most, total)
        return most


def column_pages(file: pa.parquet.ParquetFile, descriptor: int, group: int, columns: list[int]) -> list[ColumnPages]:
    """The pages of these columns of a row group; `descriptor`: of the open file. Raises ArrowInvalid."""
    found = []
    for column in columns:
        kind = file.schema.column(column)
        dictionary_bytes, largest_value, pages = 0, 0, []
        for header in _headers(descriptor, file.metadata.row_group(group).column(column)):
            size = header.bytes + header.disk_bytes
            if header.encoding is None:
                dictionary_bytes, largest_value = max(dictionary_bytes, size), max(largest_value, header.bytes)
                continue
            repeated = largest_value if header.encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY) else 0
            repeated = header.bytes if header.encoding == DELTA_BYTE_ARRAY else repeated
            pages.append(Page(header.values, size, repeated if kind.physical_type == "BYTE_ARRAY" else 0))
        fixed_bytes = max(0, kind.length) if kind.physical_type == "FIXED_LEN_BYTE_ARRAY" else 0
        found.append(ColumnPages(dictionary_bytes, pages, kind.max_repetition_level > 0, fixed_bytes))
    return found


def first_byte(chunk: pa.parquet.ColumnChunkMetaData) -> int:
    """Where the pages of a column begin in the file."""
    return min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)


@dataclass(frozen=True)
class _Header:
    """Of a page: its bytes in memory and on the disk, its values and their encoding (None: of no data page)."""

    bytes: int
    disk_bytes: int
    values: int
    encoding: int | None


def _headers(descriptor: int, chunk: pa.parquet.ColumnChunkMetaData) -> Iterator[_Header]:
    """The headers of the pages that a decoder reads of a column."""
    position = first_byte(chunk)
    end = position + chunk.total_compressed_size + CHUNK_MARGIN
    values = 0
    while values < chunk.num_values and position < end:
        fields, length = _read_header(descriptor, position)
        try:
            header = _header(fields)
        except (KeyError, TypeError):
            raise pa.ArrowInvalid(f"the page header at byte {position} has no sizes") from None
        yield header
        values += header.values
        position += length + header.disk_bytes


def _header(fields: dict[int, Any]) -> _Header:
    """Raises KeyError and TypeError for a header that misses something, or has something else in its place."""
    size, disk_bytes = max(0, fields[UNCOMPRESSED]), max(0, fields[COMPRESSED])
    for number, encoding in ENCODING_FIELD.items():
        if number in fields:
            return _Header(size, disk_bytes, max(0, fields[number][NUM_VALUES]), fields[number][encoding] + 0)
    return _Header(size, disk_bytes, 0, None)


def _read_header(descriptor: int, position: int) -> tuple[dict[int, Any], int]:
    size = HEADER_BYTES
    while True:
        data = os.pread(descriptor, size, position)
        reader = _Compact(data)
        try:
            return reader.struct(), reader.position
        except IndexError:
            if len(data) < size or size >= MAX_HEADER_BYTES:
                raise pa.ArrowInvalid(f"the page header at byte {position} does not end") from None
            size *= 32


class _Compact:
    """Reads structs of Thrift's compact protocol: numbers and structs in them; what else there is is passed over.

    Raises IndexError where the data ends, and ArrowInvalid.
    """

    def __init__(self, data: bytes):
        self.position = 0
        self._data = data

    def struct(self, depth: int = 0) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while byte := self._byte():
            number = number + (byte >> 4) if byte >> 4 else self._integer()
            fields[number] = self._value(byte & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise pa.ArrowInvalid("a page header that is nested too deeply")
        if kind in (TRUE, FALSE):
            return kind == TRUE
        if kind in (I16, I32, I64):
            return self._integer()
        if kind == STRUCT:
            return self.struct(depth + 1)
        if kind in (BYTE, DOUBLE, BINARY):
            self._skip({BYTE: 1, DOUBLE: 8}.get(kind) or self._length())
        elif kind in (LIST, SET):
            self._items(depth)
        else:
            raise pa.ArrowInvalid(f"a page header with a field of type {kind}")
        return None

    def _items(self, depth: int) -> None:
        byte = self._byte()
        for _ in range(self._length() if byte >> 4 == 15 else byte >> 4):
            if byte & 15 in (TRUE, FALSE):
                self._skip(1)
            else:
                self._value(byte & 15, depth + 1)

    def _byte(self) -> int:
        byte = self._data[self.position]
        self.position += 1
        return byte

    def _length(self) -> int:
        value, shift = 0, 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise pa.ArrowInvalid("a page header with a number above 64 bits")
        return value | byte << shift

    def _integer(self) -> int:
        value = self._length()
        return value >> 1 ^ -(value & 1)

    def _skip(self, count: int) -> None:
        self.position += count
        if self.position > len(self._data):
            raise IndexError

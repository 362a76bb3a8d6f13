"""How much memory the batches of an Arrow file take once they are decompressed, from their headers alone.

An uncompressed batch is mapped, and takes none. Of a compressed one every buffer begins with its length, which the
reader makes room for. Headers are tables of Flatbuffers (Arrow's format/Message.fbs and File.fbs).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

MAGIC = b"ARROW1"
CONTINUATION = 0xFFFFFFFF
# Kinds of messages, and numbers of fields of the tables.
DICTIONARY_BATCH, RECORD_BATCH = 2, 3
MESSAGE_KIND, MESSAGE_HEADER, MESSAGE_BODY = 1, 2, 3
BATCH_LENGTH, BATCH_BUFFERS, BATCH_COMPRESSION = 0, 2, 3
DICTIONARY_DATA = 1
FOOTER_DICTIONARIES, FOOTER_BATCHES = 2, 3
BUFFER_BYTES, BLOCK_BYTES = 16, 24


@dataclass(frozen=True)
class BatchSize:
    """A batch: its rows, the memory that it takes in bytes, and where it ends in the file."""

    rows: int
    bytes: int
    end: int
    is_dictionary: bool


def batch_sizes(file: pa.MemoryMappedFile, is_stream: bool) -> list[BatchSize]:
    """All batches in the order of the file; in the file format those of dictionaries first. Raises ArrowInvalid."""
    messages = _messages_of_stream(file) if is_stream else _messages_of_file(file)
    try:
        return [_size(file, start, length) for start, length in messages]
    except (struct.error, IndexError, ValueError, OverflowError):
        raise pa.ArrowInvalid("a message header that points outside of the file") from None


def _messages_of_file(file: pa.MemoryMappedFile) -> Iterator[tuple[int, int]]:
    """(place, length) of the header of every batch."""
    end = file.size() - len(MAGIC) - 4
    (length,) = struct.unpack("<i", file.read_at(4, end))
    footer = _Table.root(file.read_at(length, end - length))
    for field in (FOOTER_DICTIONARIES, FOOTER_BATCHES):
        for block in footer.structs(field, BLOCK_BYTES):
            yield struct.unpack_from("<qi", block)


def _messages_of_stream(file: pa.MemoryMappedFile) -> Iterator[tuple[int, int]]:
    position = 0
    while len(data := file.read_at(8, position)) == 8:
        marker, length = struct.unpack("<Ii", data)
        # Before Arrow 0.15 there was no marker.
        start, length = (8, length) if marker == CONTINUATION else (4, marker)
        if not length:
            return
        if length < 0:
            raise IndexError
        message = _Table.root(file.read_at(length, position + start))
        if message.number(MESSAGE_KIND, "<B") in (DICTIONARY_BATCH, RECORD_BATCH):
            yield position, start + length
        body = message.number(MESSAGE_BODY, "<q")
        if body < 0:
            raise IndexError
        position += start + length + body


def _size(file: pa.MemoryMappedFile, start: int, length: int) -> BatchSize:
    header = file.read_at(length, start)
    marked = header[:4] == CONTINUATION.to_bytes(4, "little")
    message = _Table.root(header[8 if marked else 4 :])
    batch = message.table(MESSAGE_HEADER)
    is_dictionary = message.number(MESSAGE_KIND, "<B") == DICTIONARY_BATCH
    if is_dictionary:
        batch = batch.table(DICTIONARY_DATA)
    size = 0
    if batch.has(BATCH_COMPRESSION):
        for buffer in batch.structs(BATCH_BUFFERS, BUFFER_BYTES):
            offset, buffer_bytes = struct.unpack("<qq", buffer)
            if buffer_bytes:
                # -1: of this buffer the bytes are as they are.
                size += max(0, *struct.unpack("<q", file.read_at(8, start + length + offset)))
    end = start + length + message.number(MESSAGE_BODY, "<q")
    return BatchSize(batch.number(BATCH_LENGTH, "<q"), size, end, is_dictionary)


class _Table:
    """A table of Flatbuffers: a place in `data`, with the places of its fields in a table before or behind it."""

    def __init__(self, data: bytes, position: int):
        self._data = data
        self._position = position
        self._fields = position - self._unpack("<i", position)

    @staticmethod
    def root(data: bytes) -> _Table:
        return _Table(data, struct.unpack_from("<I", data)[0])

    def has(self, field: int) -> bool:
        return self._place(field) is not None

    def number(self, field: int, kind: str) -> int:
        place = self._place(field)
        return 0 if place is None else self._unpack(kind, place)

    def table(self, field: int) -> _Table:
        place = self._place(field)
        if place is None:
            raise IndexError
        return _Table(self._data, place + self._unpack("<I", place))

    def structs(self, field: int, size: int) -> list[bytes]:
        place = self._place(field)
        if place is None:
            return []
        start = place + self._unpack("<I", place)
        count = self._unpack("<I", start)
        if start + 4 + count * size > len(self._data):
            raise IndexError
        return [self._data[at : at + size] for at in range(start + 4, start + 4 + count * size, size)]

    def _place(self, field: int) -> int | None:
        slot = 4 + 2 * field
        if slot + 2 > self._unpack("<H", self._fields):
            return None
        offset = self._unpack("<H", self._fields + slot)
        return self._position + offset if offset else None

    def _unpack(self, kind: str, position: int) -> int:
        if position < 0:
            raise IndexError
        return struct.unpack_from(kind, self._data, position)[0]

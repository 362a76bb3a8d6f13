"""Lines of plain and compressed files, read in a stream, with a truncated or damaged archive noticed.

Decompressing frame by frame tells a file that ends within a frame from one that ends after it; file-like readers of
zstandard take both for the end of the data.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

# Small enough that what a chunk decompresses to stays in the processor's cache and in reused memory.
CHUNK_BYTES = 1 << 16
# Frames written with the longest window that zstd knows can be read too.
MAX_WINDOW_BYTES = 1 << 31
OnBytes = Callable[[int], None]


class DamagedArchiveError(Exception):
    """A compressed file that ends early, does not decompress, or gives something else than its checksum says.

    What was read of it before may be altered too: checksums come last, and a flipped bit can hide the end.
    """


class OversizedLine:
    """Stands for a line above the limit, whose content is not kept. `bytes`: its length."""

    def __init__(self, length: int):
        self.bytes = length


def read_lines(path: Path, max_line_bytes: int, on_bytes: OnBytes) -> Iterator[bytes | memoryview | OversizedLine]:
    """Lines of a plain, .gz, .zst or .zstd file, without their ends; all whole lines.

    Raises DamagedArchiveError after the last whole line of a damaged file.

    `on_bytes` is told how much has been read from the disk. No more than `max_line_bytes` of a line is held.
    """
    beginning = _LineParts(max_line_bytes)
    with open(path, "rb", buffering=0) as file:
        for chunk in _chunks(path, file, on_bytes):
            end = chunk.find(b"\n")
            view = memoryview(chunk)
            if end < 0:
                beginning.add(view)
                continue
            beginning.add(view[:end])
            yield beginning.take()
            last = chunk.rfind(b"\n")
            while end < last:
                start, end = end + 1, chunk.find(b"\n", end + 1)
                yield view[start:end] if end - start <= max_line_bytes else OversizedLine(end - start)
            beginning.add(view[last + 1 :])
    if beginning.bytes:
        yield beginning.take()


class _LineParts:
    """A line that goes on from one chunk to the next."""

    def __init__(self, max_bytes: int):
        self.bytes = 0
        self._max_bytes = max_bytes
        self._parts: list[memoryview] = []

    def add(self, part: memoryview) -> None:
        self.bytes += len(part)
        if self.bytes > self._max_bytes:
            self._parts.clear()
        elif len(part):
            self._parts.append(part)

    def take(self) -> bytes | OversizedLine:
        length, self.bytes = self.bytes, 0
        parts, self._parts = self._parts, []
        return b"".join(parts) if length <= self._max_bytes else OversizedLine(length)


def _chunks(path: Path, file: BinaryIO, on_bytes: OnBytes) -> Iterator[bytes]:
    if path.suffix in (".zst", ".zstd"):
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        yield from _decompress(file, decompressor.decompressobj, on_bytes)
    elif path.suffix == ".gz":
        yield from _decompress(file, lambda: zlib.decompressobj(wbits=31), on_bytes, padding=b"\0")
    else:
        yield from _raw_chunks(file, on_bytes)


def _raw_chunks(file: BinaryIO, on_bytes: OnBytes) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        on_bytes(len(chunk))
        yield chunk


def _decompress(file: BinaryIO, new: Callable, on_bytes: OnBytes, padding: bytes = b"") -> Iterator[bytes]:
    """What the frames of `file` hold. Bytes of `padding` may follow a frame: gzip's own reader skips zeros there."""
    decompressor = None
    frames = 0
    for chunk in _raw_chunks(file, on_bytes):
        while chunk:
            if padding and frames and decompressor is None:
                chunk = chunk.lstrip(padding)
                if not chunk:
                    break
            decompressor = decompressor or new()
            try:
                data = decompressor.decompress(chunk)
            except (zlib.error, zstandard.ZstdError) as error:
                raise DamagedArchiveError(f"the archive is damaged ({error})") from None
            if data:
                yield data
            chunk = b""
            if decompressor.eof:
                frames += 1
                chunk, decompressor = decompressor.unused_data, None
    if decompressor is not None:
        raise DamagedArchiveError("the archive is truncated")
    if not frames:
        raise DamagedArchiveError("the archive is empty: not even one compressed frame")

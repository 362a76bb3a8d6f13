"""Lines of plain and compressed files, read in a stream, with a truncated or damaged archive noticed.

Decompressing frame by frame tells a file that ends within a frame from one that ends after it; file-like readers of
zstandard take both for the end of the data.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

# Small enough that what a chunk decompresses to stays in the processor's cache and in reused memory.
CHUNK_BYTES = 1 << 16
# What one call of a decompressor may give: a chunk of 64 KiB can hold 2 GiB of zeros.
MAX_OUTPUT_BYTES = 1 << 22
# Of a zstd block, which may take 4 bytes (RFC 8878).
BLOCK_OUTPUT_BYTES = 1 << 17
ZSTD_FRAME = 0xFD2FB528
SKIPPABLE_FRAMES = range(0x184D2A50, 0x184D2A60)
RUN_LENGTH_BLOCK = 1
OnBytes = Callable[[int], None]


class DamagedArchiveError(Exception):
    """A compressed file that ends early, does not decompress, or gives something else than its checksum says.

    What was read of it before may be altered too: checksums come last, and a flipped bit can hide the end.
    """


class MemoryLimitError(Exception):
    """A file, or a part of it, that cannot be read within `data.max_reader_bytes`."""

    def __init__(self, what: str, needed: int, allowed: int):
        super().__init__(f"{what} takes {needed} bytes of memory, data.max_reader_bytes is {allowed}")


class OversizedLine:
    """Stands for a line above the limit, whose content is not kept. `bytes`: its length."""

    def __init__(self, length: int):
        self.bytes = length


def read_lines(
    path: Path, max_line_bytes: int, max_reader_bytes: int, on_bytes: OnBytes
) -> Iterator[bytes | memoryview | OversizedLine]:
    """Lines of a plain, .gz, .zst or .zstd file, without their ends; all whole lines.

    Raises DamagedArchiveError after the last whole line of a damaged file, and MemoryLimitError where decompressing
    needs more than `max_reader_bytes`.

    `on_bytes` is told how much has been read from the disk. No more than `max_line_bytes` of a line is held.
    """
    beginning = _LineStart(max_line_bytes)
    with open(path, "rb", buffering=CHUNK_BYTES) as file:
        for chunk in _chunks(path, file, max_reader_bytes, on_bytes):
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


class _LineStart:
    """A line that goes on from one chunk to the next, which may be a byte long: it is copied, not kept in parts."""

    def __init__(self, max_bytes: int):
        self.bytes = 0
        self._max_bytes = max_bytes
        self._held = bytearray()

    def add(self, part: memoryview) -> None:
        self.bytes += len(part)
        if self.bytes <= self._max_bytes:
            self._held += part
        else:
            self._held = bytearray()

    def take(self) -> memoryview | OversizedLine:
        length, self.bytes = self.bytes, 0
        held, self._held = self._held, bytearray()
        return memoryview(held) if length <= self._max_bytes else OversizedLine(length)


def _chunks(path: Path, file: BinaryIO, max_reader_bytes: int, on_bytes: OnBytes) -> Iterator[bytes]:
    if path.suffix in (".zst", ".zstd"):
        decompressor = zstandard.ZstdDecompressor(max_window_size=max_reader_bytes)
        return _decompress(_zstd_pieces(file, max_reader_bytes, on_bytes), decompressor.decompressobj, _at_once)
    if path.suffix == ".gz":
        # gzip's own reader skips zeros behind a member too.
        new = functools.partial(zlib.decompressobj, wbits=31)
        return _decompress(_raw_chunks(file, on_bytes), new, _by_and_by, padding=b"\0")
    return _raw_chunks(file, on_bytes)


def _raw_chunks(file: BinaryIO, on_bytes: OnBytes) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        on_bytes(len(chunk))
        yield chunk


def _zstd_pieces(file: BinaryIO, max_reader_bytes: int, on_bytes: OnBytes) -> Iterator[bytes]:
    """A zstd file in pieces of some blocks each, which give at most MAX_OUTPUT_BYTES: its decompressor has no limit.

    Of what is no zstd some is a piece too: the decompressor refuses it.
    """
    while magic := file.read(4):
        if int.from_bytes(magic, "little") in SKIPPABLE_FRAMES:
            pieces = _skippable_frame(file, magic)
        elif int.from_bytes(magic, "little") == ZSTD_FRAME:
            pieces = _frame(file, magic, max_reader_bytes)
        else:
            pieces = iter([magic + file.read(CHUNK_BYTES)])
        for piece in pieces:
            on_bytes(len(piece))
            yield piece


def _skippable_frame(file: BinaryIO, magic: bytes) -> Iterator[bytes]:
    size = file.read(4)
    yield magic + size
    left = int.from_bytes(size, "little")
    while left and (part := file.read(min(left, CHUNK_BYTES))):
        left -= len(part)
        yield part


def _frame(file: BinaryIO, magic: bytes, max_reader_bytes: int) -> Iterator[bytes]:
    descriptor = file.read(1)
    flags = descriptor[0] if descriptor else 0
    single_segment, has_checksum = flags >> 5 & 1, flags >> 2 & 1
    content_size_bytes = (single_segment, 2, 4, 8)[flags >> 6]
    dictionary_id_bytes = (0, 1, 2, 4)[flags & 3]
    header = magic + descriptor + file.read(1 - single_segment + dictionary_id_bytes + content_size_bytes)
    _check_window(header, max_reader_bytes)
    parts, length, blocks = [header], len(header), 0
    is_last = False
    while not is_last:
        block = file.read(3)
        number = int.from_bytes(block, "little")
        # A file that ends here is truncated, which the decompressor notices.
        is_last = bool(number & 1) or len(block) < 3
        block += file.read(1 if number >> 1 & 3 == RUN_LENGTH_BLOCK else number >> 3)
        parts.append(block)
        length += len(block)
        blocks += 1
        if length >= CHUNK_BYTES or (blocks + 1) * BLOCK_OUTPUT_BYTES > MAX_OUTPUT_BYTES:
            yield b"".join(parts)
            parts, length, blocks = [], 0, 0
    yield b"".join(parts) + file.read(4 * has_checksum)


def _check_window(header: bytes, max_reader_bytes: int) -> None:
    try:
        window_bytes = zstandard.get_frame_parameters(header).window_size
    except zstandard.ZstdError:
        return
    if window_bytes > max_reader_bytes:
        raise MemoryLimitError("the window of a zstd frame", window_bytes, max_reader_bytes)


def _at_once(decompressor: Any, chunk: bytes) -> Iterator[bytes]:
    yield decompressor.decompress(chunk)


def _by_and_by(decompressor: Any, chunk: bytes) -> Iterator[bytes]:
    data = decompressor.decompress(chunk, MAX_OUTPUT_BYTES)
    yield data
    # A full output may have more behind it, also where all input is taken.
    while decompressor.unconsumed_tail or len(data) == MAX_OUTPUT_BYTES:
        data = decompressor.decompress(decompressor.unconsumed_tail, MAX_OUTPUT_BYTES)
        yield data


def _decompress(
    chunks: Iterator[bytes], new: Callable, expand: Callable[[Any, bytes], Iterator[bytes]], padding: bytes = b""
) -> Iterator[bytes]:
    """What the frames in `chunks` hold. Bytes of `padding` may follow a frame."""
    decompressor = None
    frames = 0
    for chunk in chunks:
        while chunk:
            if padding and frames and decompressor is None:
                chunk = chunk.lstrip(padding)
                if not chunk:
                    break
            decompressor = decompressor or new()
            try:
                for data in expand(decompressor, chunk):
                    if data:
                        yield data
            except (zlib.error, zstandard.ZstdError) as error:
                raise DamagedArchiveError(f"the archive is damaged ({error})") from None
            chunk = b""
            if decompressor.eof:
                frames += 1
                chunk, decompressor = decompressor.unused_data, None
    if decompressor is not None:
        raise DamagedArchiveError("the archive is truncated")
    if not frames:
        raise DamagedArchiveError("the archive is empty: not even one compressed frame")

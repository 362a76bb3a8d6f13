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

CHUNK_BYTES = 1 << 20


class TruncatedArchiveError(Exception):
    """A compressed file that ends early or cannot be decompressed."""


def read_lines(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """Lines of a plain, .gz, .zst or .zstd file, without their ends; all whole lines, then TruncatedArchiveError."""
    pending: list[bytes] = []
    with open(path, "rb") as file:
        for chunk in _chunks(path, file, on_bytes):
            first, *rest = chunk.split(b"\n")
            pending.append(first)
            if rest:
                yield b"".join(pending)
                yield from rest[:-1]
                pending = [rest[-1]]
    if last := b"".join(pending):
        yield last


def _chunks(path: Path, file: BinaryIO, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    if path.suffix in (".zst", ".zstd"):
        yield from _decompress(file, lambda: zstandard.ZstdDecompressor().decompressobj(), on_bytes)
    elif path.suffix == ".gz":
        yield from _decompress(file, lambda: zlib.decompressobj(wbits=31), on_bytes)
    else:
        yield from _raw_chunks(file, on_bytes)


def _raw_chunks(file: BinaryIO, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        on_bytes(len(chunk))
        yield chunk


def _decompress(file: BinaryIO, new: Callable, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    decompressor = None
    for chunk in _raw_chunks(file, on_bytes):
        while chunk:
            decompressor = decompressor or new()
            try:
                data = decompressor.decompress(chunk)
            except (zlib.error, zstandard.ZstdError) as error:
                raise TruncatedArchiveError(f"the archive is damaged ({error})") from None
            if data:
                yield data
            chunk = b""
            if decompressor.eof:
                chunk, decompressor = decompressor.unused_data, None
    if decompressor is not None:
        raise TruncatedArchiveError("the archive is truncated")

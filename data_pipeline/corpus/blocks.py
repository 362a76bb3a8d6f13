"""Bytes of a file read exactly, and a block of it compared with its checksum."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline.errors import CorpusError

RESTORE = "restore it or prepare the corpus again elsewhere"


def as_bytes(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array, to read into."""
    return memoryview(array.data).cast("B")


def read_exactly(path: str | Path, descriptor: int, into: memoryview, offset: int) -> None:
    """Fill `into` with the bytes of a file from `offset` on. Raises CorpusError where it ends early, OSError."""
    done = 0
    while done < len(into):
        more = os.preadv(descriptor, [into[done:]], offset + done)
        if more == 0:
            # Where it ends now, not where it was read: the same message for every range beyond it.
            size = os.fstat(descriptor).st_size
            raise CorpusError(f"{path}: truncated while it was in use, to {size} bytes; {RESTORE}")
        done += more


def check_block(
    path: str | Path,
    descriptor: int,
    block: int,
    block_bytes: int,
    file_bytes: int,
    digests: bytes,
    advice: str = RESTORE,
) -> None:
    """Compare a block of a file with its xxh3-64 in `digests` (8 bytes a block). Raises CorpusError, OSError."""
    begin = block * block_bytes
    end = min(begin + block_bytes, file_bytes)
    data = memoryview(bytearray(end - begin))
    read_exactly(path, descriptor, data, begin)
    if xxhash.xxh3_64_digest(data) != digests[8 * block : 8 * block + 8]:
        raise CorpusError(altered_block(path, block, block_bytes, begin, end, advice))


def altered_block(path: str | Path, block: int, block_bytes: int, begin: int, end: int, advice: str) -> str:
    """The message for a block, bytes [begin, end) of a file, that is not what was written."""
    return (
        f"{path}: altered: the {block_bytes / 2**20:g} MiB block {block} (bytes {begin} to {end - 1}) has another "
        f"content than when it was written (xxh3 differs); {advice}"
    )

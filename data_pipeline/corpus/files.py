"""Files of which every byte is accounted for: checksums, writing that a kill cannot tear, flushing to the disk."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import xxhash

from conf.named_files import unsafe_file
from data_pipeline.errors import CorpusError

# A damaged byte is found to within one block, and a reader of a range can check what it fetched.
BLOCK_BYTES = 4 * 1024 * 1024
# Hashed at once by all hashes, and read again and again into the same memory: stays in the processor's cache.
HASHED_BYTES = 256 * 1024
# Takes the next bytes of a file that is being written.
Put = Callable[[bytes | memoryview], object]


@dataclass(frozen=True)
class FileHashes:
    """Size and checksums of a file, all from one pass."""

    bytes: int
    sha256: str
    xxh3_128: str
    # xxh3-64 of each BLOCK_BYTES of the file, in order.
    xxh3_64_blocks: list[str]


class _Hasher:
    def __init__(self, with_sha256: bool = True):
        self._sha256 = hashlib.sha256() if with_sha256 else None
        self._xxh3 = xxhash.xxh3_128()
        self._block = xxhash.xxh3_64()
        self._block_fill = 0
        self._blocks: list[str] = []
        self._bytes = 0

    def update(self, data: memoryview) -> None:
        self._bytes += len(data)
        while len(data):
            part = data[: min(HASHED_BYTES, BLOCK_BYTES - self._block_fill)]
            if self._sha256:
                self._sha256.update(part)
            self._xxh3.update(part)
            self._block.update(part)
            self._block_fill += len(part)
            data = data[len(part) :]
            if self._block_fill == BLOCK_BYTES:
                self._close_block()

    def _close_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block = xxhash.xxh3_64()
        self._block_fill = 0

    def result(self) -> FileHashes:
        if self._block_fill:
            self._close_block()
        sha256 = self._sha256.hexdigest() if self._sha256 else ""
        return FileHashes(self._bytes, sha256, self._xxh3.hexdigest(), self._blocks)


def hash_file(
    path: Path,
    with_sha256: bool = True,
    on_bytes: Callable[[int], None] | None = None,
    places: tuple[int, int] | None = None,
) -> FileHashes:
    """Checksums of a file as it is on disk now, or of its bytes from places[0] up to places[1].

    Without sha256 (left empty) it runs about ten times faster.
    """
    hasher = _Hasher(with_sha256)
    buffer = memoryview(bytearray(HASHED_BYTES))
    with open(path, "rb", buffering=0) as file:
        start, end = places or (0, sys.maxsize)
        file.seek(start)
        while count := file.readinto(buffer[: end - start]):
            start += count
            hasher.update(buffer[:count])
            if on_bytes:
                on_bytes(count)
    return hasher.result()


def write_atomically(path: Path, write: Callable[[Put], None], mode: int = 0o666) -> FileHashes:
    """Create `path` so that at any kill it is absent, as before, or complete; returns its checksums.

    `write` gets a function that takes bytes. The data go to a file of their own, `<path>.<random>.partial`, are flushed
    to the disk, then renamed: processes that write the same path do not meet. `mode`: who may do what with it, as far
    as the umask allows.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")
    hasher = _Hasher()
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:

            def put(data: bytes | memoryview) -> int:
                view = memoryview(data)
                hasher.update(view)
                return file.write(view)

            write(put)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        # Gives the space back where there was too little of it.
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)
    return hasher.result()


def write_whole(path: Path, data: bytes | memoryview, mode: int = 0o666) -> FileHashes:
    """`write_atomically` of a file whose content is at hand."""

    def write(put: Put) -> None:
        put(data)

    return write_atomically(path, write, mode)


def remove_partials(folder: Path, names: Collection[str]) -> None:
    """Delete what killed processes left of writing files called `names` in `folder`, while nobody writes any."""
    for path in folder.glob("*.partial"):
        found = re.fullmatch(r"(.+)\.[0-9a-f]{12}\.partial", path.name)
        if found and found[1] in names and path.is_file():
            path.unlink(missing_ok=True)


def path_in(folder: Path, name: str, document: str, key: str, may_link_to: Callable[[str], bool] | None = None) -> Path:
    """Where a file lies that `document` in `folder` names by `key`: the one place where such names are joined.

    Raises CorpusError for a name that leads elsewhere, or to no regular file (conf.named_files.unsafe_file).
    """
    if problem := unsafe_file(folder / document, key, name, folder, may_link_to):
        raise CorpusError(problem)
    return folder / name


def sync(path: Path) -> None:
    """Make a file's content, or renames and new names inside a folder, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

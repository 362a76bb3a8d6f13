"""A corpus on an object store or any other file system that fsspec opens, read through a bounded cache on local disk.

The manifest, the table of shards and the tokenizer are copied when the corpus is opened. A shard is a sparse file in
the cache that is filled block by block (4 MiB) as blocks are needed. A block counts only when its checksum is the
manifest's, and every process compares it before its first use: what a killed process left half written, what another
rank is writing just now, and what was damaged on the local disk are all the same case, and the block is fetched again.

Ranks of a node share the cache: a lock on the block's bytes makes one of them fetch it. When the cache is full, the
shards that were opened longest ago are unlinked; a process that still has one open keeps reading from what it holds,
and opens the file anew before it fetches more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from conf.named_files import unsafe_file
from conf.passwords import has_hidden_password, without_passwords
from data_pipeline.corpus.blocks import RESTORE, altered_block
from data_pipeline.corpus.file_systems import ATTEMPTS, Result, open_folder, shown, wait
from data_pipeline.corpus.files import write_whole
from data_pipeline.corpus.manifest import MANIFEST_FILE, Manifest
from data_pipeline.corpus.shard_table import SHARD_TABLE_FILE
from data_pipeline.errors import CorpusError, ReadingError
from data_pipeline.network import REQUESTS, GivenUp, NetworkConfig, Refused, Request, persist

# Of a block that arrives short or altered.
_ALTERED_ATTEMPTS = 2
# How many files of a cache a process keeps open: what it has open it may keep on the disk.
OPEN_CACHED_FILES = 256
# The cache is measured when so much of its limit was fetched, and emptied to seven eighths of it.
_MEASURE_EVERY = 128
_HEX = "[0-9a-f]"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Lock files in the cache; a fetch holds that of its block, which few others share.
_LOCKS = 256


@dataclass(frozen=True)
class CacheSettings:
    """Folder on a local disk, shared by the ranks of a node, and how many bytes of shards it may hold."""

    directory: Path
    limit_bytes: int
    # How what is not there is fetched.
    network: NetworkConfig = field(default_factory=NetworkConfig)


def is_remote(directory: str | Path) -> bool:
    """Whether a corpus folder is a URL (`s3://...`) and not a path."""
    return "://" in str(directory)


class RemoteCorpus:
    """The files of a corpus at a URL. `folder`: the local copies of all but the shards.

    `url`: without the password that the URL may hold, which no message shows.
    """

    def __init__(self, url: str, cache: CacheSettings):
        if has_hidden_password(url):
            raise CorpusError(f"{url}: its password was not kept; name the corpus with it (corpus.directory)")
        self.url = without_passwords(url.rstrip("/"))
        self._shown = functools.partial(shown, url=url)
        try:
            self._system, self._root = open_folder(url)
        except (ImportError, ValueError) as error:
            raise CorpusError(f"{self.url}: cannot be opened ({self._shown(error)})") from None
        self._network = cache.network
        self._cache = cache.directory
        self.folder = cache.directory / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self._shards = self.folder / "shards"
        self._limit = cache.limit_bytes
        self._since_measured = self._limit
        # Set by `use`.
        self._manifest: Manifest

    def copy_description(self) -> None:
        """Bring manifest, table of shards and tokenizer to `folder`. Raises CorpusError."""
        with _explained(self.folder, self._limit):
            self._shards.mkdir(parents=True, exist_ok=True)
            (self._cache / ".locks").mkdir(exist_ok=True)
            with _locked(self.folder / ".lock"):
                self._copy(MANIFEST_FILE)
                self._copy(SHARD_TABLE_FILE)
                (self.folder / "tokenizer").mkdir(exist_ok=True)
                for path in self._retry("tokenizer", lambda: self._system.ls(f"{self._root}/tokenizer", detail=False)):
                    name = f"tokenizer/{path.rstrip('/').rsplit('/', 1)[-1]}"
                    if problem := unsafe_file(self.url, "its list of tokenizer/", name):
                        raise CorpusError(problem)
                    self._copy(name)

    def _copy(self, name: str) -> None:
        data = self._retry(name, lambda: self._system.cat_file(f"{self._root}/{name}"))
        path = self.folder / name
        if not (path.is_file() and path.read_bytes() == data):
            write_whole(path, data)

    def use(self, manifest: Manifest) -> None:
        """The manifest whose shards `locate` and `fill` are about."""
        self._manifest = manifest
        largest = min(manifest.block_bytes, int(manifest.shards.bytes.max()))
        if self._limit < 8 * largest:
            raise CorpusError(
                f"corpus.cache_gib: {self._limit / 2**30:g} GiB is less than eight blocks of {largest} bytes; raise it"
            )

    def open(self, row: int) -> int:
        """A descriptor of the sparse file of a shard in the cache; made when there is none. Raises CorpusError."""
        # By its content: a run that still reads what lay at the URL before never meets another's blocks.
        path = self._shards / f"{self._manifest.shards.sha256(row).hex()[:32]}.arrow"
        size = int(self._manifest.shards.bytes[row])
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        with _explained(self.folder, self._limit):
            descriptor = os.open(path, flags)
            if os.fstat(descriptor).st_size not in (0, size):
                # Another process may have it open and compared: it keeps that file, this one begins anew.
                os.close(descriptor)
                path.unlink(missing_ok=True)
                descriptor = os.open(path, flags)
            # Makes a new file longer, and leaves alone what another process has filled meanwhile.
            os.ftruncate(descriptor, size)
            os.utime(descriptor)
        return descriptor

    def name(self, row: int) -> str:
        """The shard's own place, for messages."""
        return f"{self.url}/{self._manifest.shards.file(row)}"

    def fill(
        self, row: int, block: int, descriptor: int, is_right: Callable[[], bool], let_go: Callable[[], object]
    ) -> None:
        """Fetch one block into an open cached file unless `is_right` says that another process has done so.

        `let_go` closes what this process has open of what was dropped from the cache, which takes room until then.
        Raises CorpusError when it cannot be fetched or kept.
        """
        size = self._manifest.block_bytes
        begin = block * size
        end = min(begin + size, int(self._manifest.shards.bytes[row]))
        file = self._manifest.shards.file(row)
        expected = self._manifest.shards.block_hashes(row)[8 * block : 8 * block + 8]
        left = _ALTERED_ATTEMPTS

        def fetch() -> bytes:
            nonlocal left
            data: bytes = self._system.cat_file(f"{self._root}/{file}", begin, end)
            problem = ""
            if len(data) != end - begin:
                problem = f"{self.name(row)}: truncated: bytes {begin} to {end - 1} are not all there"
            elif xxhash.xxh3_64_digest(data) != expected:
                # Never put into the cache: another process may have fetched it whole and be reading it.
                problem = altered_block(self.name(row), block, size, begin, end, RESTORE)
            if problem:
                left -= 1
                # The first time the network may be to blame.
                raise ConnectionError(problem) if left else Refused(problem)
            return data

        with _explained(self.folder, self._limit), self._locked_for(file, block):
            if is_right():
                return
            data = self._retry(file, fetch)
            self._make_room(end - begin, descriptor)
            for attempt in range(ATTEMPTS):
                try:
                    _write(descriptor, data, begin)
                    break
                except OSError as error:
                    if error.errno not in _FULL or attempt == ATTEMPTS - 1:
                        raise
                # Others fill the disk too: give back what can be given. Other ranks let go of it as they fetch.
                self._evict(0, descriptor)
                let_go()
                if attempt:
                    wait(attempt - 1)

    @contextmanager
    def _locked_for(self, file: str, block: int) -> Iterator[None]:
        """Hold the lock of a block. Another process that has it may be fetching that block, for long."""
        with open(self._lock_of(file, block), "w") as lock, REQUESTS.noted(Request(file)):
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _lock_of(self, file: str, block: int) -> Path:
        # Not a lock on bytes of the cached file: those belong to a process, do not keep out its own threads, and are
        # refused as a deadlock where threads of two ranks each wait for a block of the other.
        number = xxhash.xxh3_64_intdigest(f"{self.url}/{file} {block}".encode()) % _LOCKS
        return self._cache / ".locks" / f"{number:02x}"

    def _make_room(self, size: int, keep: int) -> None:
        self._since_measured += size
        if self._since_measured * _MEASURE_EVERY >= self._limit:
            self._since_measured = 0
            self._evict(self._limit * 7 // 8, keep)

    def _evict(self, target: int, keep: int) -> None:
        """Unlink the shards opened longest ago until the rest takes at most `target` bytes, if it takes the limit.

        The file that is open as `keep` stays.
        """
        kept = os.fstat(keep).st_ino
        with _locked(self._cache / ".lock"):
            files = []
            # Of all corpora that were read through this cache; by names that nothing else has.
            for path in self._cache.glob(f"{_HEX * 16}/shards/{_HEX * 32}.arrow"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    files.append((status.st_mtime_ns, status.st_blocks * 512, status.st_ino, path))
            total = sum(size for _, size, _, _ in files)
            if target and total <= self._limit * 15 // 16:
                return
            for _, size, inode, path in sorted(files):
                if total <= target:
                    return
                if inode != kept:
                    path.unlink(missing_ok=True)
                    total -= size

    def _retry(self, name: str, action: Callable[[], Result]) -> Result:
        """What `action` fetches. Raises CorpusError."""
        # Each file system has its own errors for a network that fails for a moment.
        try:
            return persist(f"{self.url}/{name}", action, self._network, self._shown)
        except FileNotFoundError:
            raise CorpusError(f"{self.url}/{name}: missing; restore it or prepare the corpus again elsewhere") from None
        except Refused as error:
            raise CorpusError(str(error)) from None
        except GivenUp as error:
            # Not from the error: its own words would stand in a traceback.
            raise ReadingError(
                f"{self.url}/{name}: {error} (corpus.network.total_seconds={self._network.total_seconds:g})"
            ) from None


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file against all other threads and processes that do the same."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _explained(folder: Path, limit: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        if error.errno in _FULL:
            raise ReadingError(
                f"{folder}: the disk of the cache is full ({reason}); free some space, lower corpus.cache_gib (now "
                f"{limit / 2**30:g}), or set corpus.cache_directory to another disk"
            ) from None
        raise ReadingError(f"{folder}: the cache cannot be used ({reason}); set corpus.cache_directory") from None

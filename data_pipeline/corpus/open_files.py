"""The open files of a corpus' shards."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.corpus.remote import RemoteCorpus
from data_pipeline.errors import CorpusError

# Files that a process keeps open at most, if its limit on open files allows.
MAX_OPEN_FILES = 16384


class OpenFiles:
    """Read-only descriptors of the files of a corpus' shards, the oldest closed when there are too many.

    `locate` gives the path of the file of a row of the table of shards, which has `rows`. `remote`: where they
    come from, if they are read through a cache. Safe to use from threads.
    """

    def __init__(
        self,
        locate: Callable[[int], str | Path],
        rows: int,
        limit: int | None = None,
        remote: RemoteCorpus | None = None,
    ):
        self.locate = locate
        self.remote = remote
        self._limit = _raise_limit() if limit is None else limit
        self._open: dict[int, Descriptor] = {}
        # Which file a row had when it was first opened, in 8 bytes: rows may be a million.
        self._first = np.zeros(rows, dtype=np.int64)
        self._lock = threading.Lock()

    def get(self, row: int) -> Descriptor:
        """The descriptor of the file of `row`; it stays open for as long as the caller holds it.

        Raises OSError, CorpusError where another file has taken the place of one that was open before.
        """
        found = self._open.get(row)
        if found is None:
            if self.remote is None:
                found = Descriptor(os.open(self.locate(row), os.O_RDONLY | os.O_CLOEXEC))
            else:
                found = Descriptor(self.remote.open(row))
            with self._lock:
                if self.remote is None:
                    self._refuse_another(row, found)
                # Another thread may have been faster: one descriptor for all, with what was checked of it.
                found = self._open.setdefault(row, found)
                while len(self._open) > self._limit:
                    del self._open[next(iter(self._open))]
        return found

    def _refuse_another(self, row: int, found: Descriptor) -> None:
        status = os.fstat(found.number)
        this = hash((status.st_ino, status.st_size, status.st_mtime_ns)) or 1
        if self._first[row] not in (0, this):
            # Blocks that were compared were those of the file before.
            raise CorpusError(
                f"{self.locate(row)}: altered: another file since this process first read from it; bring back the file "
                "of this corpus, or start the process again"
            )
        self._first[row] = this

    def forget_unlinked(self) -> None:
        """Let go of files that a cache has dropped, so that their space is free."""
        with self._lock:
            for row in [row for row, found in self._open.items() if os.fstat(found.number).st_nlink == 0]:
                del self._open[row]

    def forget(self, row: int) -> None:
        """Open the file of `row` anew at its next use."""
        with self._lock:
            self._open.pop(row, None)


class Descriptor:
    # Closed with its last reference: a thread that still reads from it never meets a number that was given anew.
    __slots__ = ("checked", "number")

    def __init__(self, number: int):
        # Of a cached file: its blocks that were compared. They belong to this file, not to the next of its name.
        self.checked: set[int] = set()
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def _raise_limit() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(2 * MAX_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    # Half is left to sockets and the other files of a run.
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, soft // 2)

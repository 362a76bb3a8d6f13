"""Who works on what, told by files, so that any number of processes on any number of nodes can share a preparation.

A claim is a file that only one process can make, and that appears whole. Its holder touches it now and then; on the
machine of the holder a claim ends with the process, elsewhere when nothing has touched it for LEASE_SECONDS. A claim
that has ended is followed by one with the next number, which again only one process can make. Were two processes ever
to work on one thing, both would write the same bytes under names of their own and rename them to the same name.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

LEASE_SECONDS = 120.0
HEARTBEAT_SECONDS = 10.0


class Claims:
    """Claims kept in `folder`, and the thread that touches those of this process. Use as a context manager."""

    def __init__(self, folder: Path, parent: int | None = None):
        """`parent`: a process without which this one must not go on (it ends itself within a second)."""
        self._folder = folder
        self._parent = parent
        self._held: set[Path] = set()
        self._stop = threading.Event()
        # Claim file -> (time of its last touch, when that was first seen here, whether it ever changed).
        self._seen: dict[Path, tuple[int, float, bool]] = {}

    def __enter__(self) -> Claims:
        self._folder.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._keep, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    @contextmanager
    def take(self, name: str) -> Iterator[bool]:
        """Whether `name` could be claimed; it is, while the context lasts."""
        path = self._create(name)
        if path is None:
            yield False
            return
        self._held.add(path)
        try:
            yield True
        finally:
            self._held.discard(path)
            for file in self._files(name):
                if _number(file) <= _number(path):
                    file.unlink(missing_ok=True)

    def surely_held(self, name: str) -> bool:
        """Whether another process is known to be at work on `name`; False also while that cannot be told yet."""
        files = self._files(name)
        return bool(files) and (_is_local(_read(files[-1])) or self._seen.get(files[-1], (0, 0, False))[2])

    def _files(self, name: str) -> list[Path]:
        files: list[Path] = []
        # Whatever has the name, a link that leads nowhere too: nobody else can make a claim of it.
        while os.path.lexists(path := self._folder / f"{name}.{len(files)}"):
            files.append(path)
        return files

    def _have_ended(self, files: list[Path]) -> bool:
        # Each is looked at: those of other machines are judged by how long they have been seen without a change.
        return all([self._has_ended(file) for file in files])

    def _create(self, name: str) -> Path | None:
        files = self._files(name)
        if not self._have_ended(files):
            return None
        path = self._folder / f"{name}.{len(files)}"
        # A second name of a file that is written: a kill never leaves a claim that does not tell its holder.
        written = self._folder / f"{uuid.uuid4().hex}.partial"
        written.write_text(json.dumps(_identity(os.getpid())))
        try:
            os.link(written, path)
        except FileExistsError:
            return None
        finally:
            written.unlink()
        # Since the first look the claims may have ended and begun anew from 0: then this number proves nothing.
        if not self._have_ended([file for file in self._files(name) if file != path]):
            path.unlink(missing_ok=True)
            return None
        return path

    def _has_ended(self, path: Path) -> bool:
        holder = _read(path)
        if _is_local(holder):
            return _identity(holder.get("pid", 0)) != holder
        try:
            touched = path.lstat().st_mtime_ns
        except FileNotFoundError:
            return False
        last, since, changed = self._seen.setdefault(path, (touched, time.monotonic(), False))
        if last != touched:
            self._seen[path] = (touched, time.monotonic(), True)
            return False
        return time.monotonic() - since > LEASE_SECONDS

    def _keep(self) -> None:
        touched = time.monotonic()
        while not self._stop.wait(1.0):
            if self._parent is not None and os.getppid() != self._parent:
                os._exit(1)
            if time.monotonic() - touched >= HEARTBEAT_SECONDS:
                touched = time.monotonic()
                for path in list(self._held):
                    try:
                        os.utime(path)
                    except OSError:
                        # Released just now, or the file system is away for a moment: the lease outlasts that.
                        continue


def _number(path: Path) -> int:
    return int(path.suffix[1:])


def _read(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _machine() -> list[str]:
    """This machine since its start, and the process ids that mean the same here."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [socket.gethostname(), boot, os.readlink("/proc/self/ns/pid")]
    except OSError:
        return [socket.gethostname()]


def _is_local(holder: dict[str, Any]) -> bool:
    return holder.get("machine") == _machine()


def _identity(pid: int) -> dict[str, Any] | None:
    """What tells a process from all others of its machine; None when it has ended."""
    started = _started(pid)
    return None if started is None else {"machine": _machine(), "pid": pid, "started": started}


def _started(pid: int) -> float | None:
    try:
        if os.path.exists("/proc/self/stat"):
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            # Clock ticks since the machine started: unlike a time of day it does not move when the clock is set. A dead
            # process that nobody waits for is still listed.
            return None if state in "ZX" else float(fields[18])
        return psutil.Process(pid).create_time()
    except (OSError, psutil.NoSuchProcess):
        return None

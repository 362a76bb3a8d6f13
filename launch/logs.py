"""`python -m launch logs`: what the processes of a run print, over all of its attempts."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from conf import ConfigError
from launch.folder import LaunchFolder

# Between two looks at a file that may grow.
POLL_SECONDS = 0.5
_BLOCK = 1 << 16


def show_logs(run: Path, rank: int | None, attempt: int | None, follow: bool) -> int:
    """Copy a log to standard output. Raises ConfigError where there is none."""
    folder = LaunchFolder(run)
    if not folder.job.is_file():
        raise ConfigError([f"{run}: was not submitted, it has no {folder.job.relative_to(folder.run)}"])
    shown: set[Path] = set()
    while True:
        for path in _files(folder, rank, attempt):
            if path not in shown:
                shown.add(path)
                _copy(path, follow, partial(_is_over, path, folder, rank, attempt))
        if not follow:
            break
        time.sleep(POLL_SECONDS)
    if not shown:
        raise ConfigError([f"{run}: {_absence(folder, rank, attempt)}"])
    return 0


def _files(folder: LaunchFolder, rank: int | None, attempt: int | None) -> list[Path]:
    """The files to show, oldest first."""
    if rank is None and attempt is None:
        # Of each job, with what the batch script says between attempts.
        return sorted((folder.run / "logs").glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)
    number = attempt or max((int(path.name[8:]) for path in (folder.run / "logs").glob("attempt-*")), default=0)
    path = folder.logs(number) / f"rank-{rank or 0:05d}.out"
    return [path] if path.is_file() else []


def _is_over(path: Path, folder: LaunchFolder, rank: int | None, attempt: int | None) -> bool:
    """Whether a later file is there."""
    return _files(folder, rank, attempt)[-1:] != [path]


def _absence(folder: LaunchFolder, rank: int | None, attempt: int | None) -> str:
    logs = [path.stem for path in sorted((folder.run / "logs").glob("attempt-*/rank-*.out"))]
    if not logs:
        return "none of its processes has begun; look at the queue: python -m launch status"
    wanted = "" if attempt is None else f" in attempt {attempt}"
    return f"--rank: no rank {rank or 0}{wanted}; there are {int(min(logs)[5:])} to {int(max(logs)[5:])}"


def _copy(path: Path, follow: bool, is_over: Callable[[], bool]) -> None:
    """Copy a file, and go on with what is added to it until another is to be shown."""
    # A character may be half written.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    with path.open("rb") as file:
        while True:
            while block := file.read(_BLOCK):
                sys.stdout.write(decoder.decode(block))
            sys.stdout.flush()
            if not follow or is_over():
                return
            time.sleep(POLL_SECONDS)

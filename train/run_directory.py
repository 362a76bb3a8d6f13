"""The folder of one run: every path in it, and the append-only event log.

Layout (documented in docs/training.md): config.yaml, configurations/NNNN.yaml, plan.json, deepspeed.json, code.json,
environment.json, metrics.jsonl, events.jsonl, logs/rank-NNNNN.log, logs/rank-NNNNN.end.json, tokenizer/,
checkpoints/step-XXXXXXXX/, report.png.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from conf.named_files import unsafe_file
from conf.passwords import without_passwords
from conf.problems import other_format
from data_pipeline.corpus import files
from data_pipeline.corpus.files import remove_partials
from train.errors import RunError

EVENTS_FORMAT_VERSION = 1
# In a copy of the source tree: what `code_revision` says of the original.
COPIED_REVISION = "code.json"
CHECKPOINTS_LOCK = "checkpoints.lock"


class RunDirectory:
    """Paths of a run. Making the object creates nothing."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.configurations = path / "configurations"
        self.plan = path / "plan.json"
        self.engine_settings = path / "deepspeed.json"
        self.code = path / "code.json"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "events.jsonl"
        self.samples = path / "samples.jsonl"
        # What `python -m train.evaluate RUN suite=NAME` found.
        self.evaluations = path / "evaluations.jsonl"
        self.logs = path / "logs"
        self.tokenizer = path / "tokenizer"
        self.checkpoints = path / "checkpoints"
        self.lock = path / "run.lock"
        self.checkpoints_lock = path / CHECKPOINTS_LOCK
        self.mirror_void = path / "mirror_void.json"
        self.baselines = path / "baselines.json"

    def log(self, rank: int) -> Path:
        """What one rank logs."""
        return self.logs / f"rank-{rank:05d}.log"

    def end(self, rank: int) -> Path:
        """How one rank ended, where it could say so."""
        return self.logs / f"rank-{rank:05d}.end.json"

    def collectives(self, rank: int, attempt: str) -> Path:
        """What torch's flight recorder has of one rank of a start that hung."""
        return self.logs / f"nccl-{attempt}" / f"rank-{rank:05d}"

    def create(self) -> None:
        for folder in (self.path, self.logs, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)

    def unwritable(self) -> list[str]:
        """Where a run could not write, one line each: an earlier start's folders, or what its folder would lie in."""
        there = [path for path in (self.path, self.logs, self.checkpoints, self.configurations) if path.is_dir()]
        if not there:
            there = [next(parent for parent in self.path.absolute().parents if parent.exists())]
        problems = []
        for path in there:
            if not (path.is_dir() and os.access(path, os.W_OK | os.X_OK, effective_ids=True)):
                why = "its permissions do not allow it"
                if not path.is_dir():
                    why = "it is no folder"
                elif os.statvfs(path).f_flag & os.ST_RDONLY:
                    why = "its file system is read-only"
                problems.append(f"run_root: {path} cannot be written to, {why}; change that, or set run_root elsewhere")
        return problems

    def foreign(self) -> list[str]:
        """Files that a run goes on writing to, and that are no files of its own: one line each."""
        # All others are written anew and renamed, whatever had their names.
        files = [self.events, self.lock, self.checkpoints_lock, *sorted(self.logs.glob("rank-*.log"))]
        found = (unsafe_file(file.parent, "a file", file.name, file.parent) for file in files)
        return [problem for problem in found if problem]

    def keep_configuration(self, text: str) -> str:
        """Make `text` the run's config.yaml, and keep it as that of one more attempt; returns this file's name.

        The file lies in the run's folder and is never written again. Rank 0 only, under the run's lock.
        """
        self.configurations.mkdir(exist_ok=True)
        kept = [int(file.stem) for file in self.configurations.glob("*.yaml") if file.stem.isdecimal()]
        if not kept and self.config.exists():
            # Of an attempt of version 0.2.0 or before; as it is, where it is damaged too.
            text_before = self.config.read_text(encoding="utf-8", errors="replace") if self.config.is_file() else ""
            write_atomically(self.configurations / "0001.yaml", without_passwords(text_before))
            kept = [1]
        file = self.configurations / f"{max(kept, default=0) + 1:04d}.yaml"
        write_atomically(file, text)
        write_atomically(self.config, text)
        return str(file.relative_to(self.path))

    def remove_partials(self) -> None:
        """Delete what kills left of files under work. Rank 0 only, under the run's lock."""
        # Not of baselines.json, which another command writes without the lock.
        files = [self.config, self.plan, self.engine_settings, self.code, self.environment, self.metrics, self.samples]
        files.append(self.mirror_void)
        remove_partials(self.path, [file.name for file in files])
        remove_partials(self.configurations, [f"{number:04d}.yaml" for number in range(10_000)])


@dataclass(frozen=True)
class Attempt:
    """One start of a run. Of two that believe to work on it, the run's lock file names the later.

    A rank may outlive its job: stopped, waiting for a disk, cut off from the others. It must not write where the next
    start does.
    """

    identity: str
    lock: Path

    def check(self) -> None:
        """Raises RunError where another start has taken the run over, OSError where the lock file cannot be read."""
        found = self.lock.read_text(encoding="utf-8") if self.lock.exists() else ""
        if not found.endswith(f"attempt {self.identity}"):
            raise RunError(
                f"{self.lock.parent}: another start has taken over this run ({found or 'its lock file is empty'}); "
                f"this process of attempt {self.identity} ends and writes nothing more there"
            )


class RunLock:
    """Held by rank 0 while it trains: two sets of processes in one folder would overwrite each other's files.

    The operating system gives the lock up when the process ends, however it ends.
    """

    def __init__(self, path: Path):
        """Raises BlockingIOError, naming the holder, when another process holds the lock."""
        self._file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip()
            raise BlockingIOError(
                f"{path.parent} is in use by {holder or 'another process'}; end it first, or give this run another name"
            ) from None
        self._file.seek(0)
        # Of the start before this one; "" where there was none.
        self.attempt_before = self._file.read().rpartition("attempt ")[2].strip()
        self.attempt = Attempt(uuid.uuid4().hex[:12], path)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}, attempt {self.attempt.identity}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


class EventLog:
    """events.jsonl: a header, then one line for each thing that happened to the run, never rewritten. Rank 0 writes.

    A last line that a kill left torn is cut off before the next is written.
    """

    def __init__(self, path: Path, is_main: bool):
        self.path = path
        self.is_main = is_main

    def append(self, kind: str, /, **fields: Any) -> None:
        """Add one event; `fields` must be JSON values, and may have a `kind` of their own."""
        if self.is_main:
            with self._opened() as file:
                _write_event(file, kind, fields)

    def append_failure(self, attempt: object, **fields: object) -> dict[str, Any] | None:
        """Add the event `error` of a start of the run, on any rank. Where one of them has done so before, nothing is
        added, and that event is returned."""
        with self._opened() as file:
            file.seek(0)
            for line in _parsed(file.read().splitlines()):
                if line.get("event") == "error" and line.get("attempt") == attempt:
                    return line
            file.seek(0, os.SEEK_END)
            _write_event(file, "error", {"attempt": attempt, **fields})
        return None

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """The file, at its end, behind a whole line, and for this process alone."""
        with self.path.open("ab+") as file:
            # A second command for the run, refused because the first holds the run's lock, says so here as well.
            fcntl.flock(file, fcntl.LOCK_EX)
            _mend_last_line(file)
            yield file


def _write_event(file: BinaryIO, kind: str, fields: dict[str, Any]) -> None:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    lines = [without_passwords({"time": now, "event": kind, **fields})]
    if file.tell() == 0:
        lines.insert(0, {"time": now, "event": "header", "format_version": EVENTS_FORMAT_VERSION})
    file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def _mend_last_line(file: BinaryIO) -> None:
    """Leave `file` at the end of a whole line: a whole last one gets the line end it lacks, a torn one is cut off."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if file.read() in (b"", b"\n"):
        return
    file.seek(0)
    last = file.read().splitlines()[-1]
    if _parsed([last]):
        file.write(b"\n")
    else:
        file.truncate(end - len(last))
        file.seek(0, os.SEEK_END)


def read_events(run_directory: Path) -> list[dict[str, Any]]:
    """Every event of a run's events.jsonl but the header, in order. Raises as `read_versioned_lines` does.

    A line that names no event is passed over: another program, or an editor, left it.
    """
    lines = read_versioned_lines(Path(run_directory) / "events.jsonl", EVENTS_FORMAT_VERSION)[1:]
    return [line for line in lines if isinstance(line.get("event"), str)]


def read_versioned_lines(path: Path, version: int) -> list[dict[str, Any]]:
    """The lines of a JSON lines file whose header states its `version`, the header first.

    Raises FileNotFoundError when there is none, ValueError when another version of this program wrote it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; is {path.parent} the folder of a run that has started?")
    lines = read_lines(path)
    if problem := other_format(path, lines[0].get("format_version") if lines else None, version):
        raise ValueError(problem)
    return lines


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every line that is a JSON object: a run that was killed while it wrote leaves a torn last one."""
    return _parsed(path.read_bytes().splitlines()) if path.is_file() else []


def bad_lines(path: Path, is_good: Callable[[dict[str, Any]], bool]) -> list[str]:
    """What readers pass over in a JSON lines file: one text for each line that is no JSON object, or of which `is_good`
    is false. Empty lines say nothing that could be lost."""
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        content = _parsed([line])
        if line.strip() and not (content and is_good(content[0])):
            begin = line[:60].decode(errors="replace") + ("..." if len(line) > 60 else "")
            what = "is not what this file has" if content else "is no JSON object"
            found.append(f"{path.name}, line {number:,} {what}: {without_passwords(begin)}")
    return found


def _parsed(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    parsed = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(content := json.loads(line), dict):
                parsed.append(content)
    return parsed


def write_atomically(path: Path, text: str, mode: int = 0o666) -> None:
    """Write `text` so that a reader, or a crash, sees the old file or the whole new one.

    `mode`: who may do what with it, as far as the umask allows.
    """
    files.write_whole(path, text.encode(), mode)


def code_revision(repository: Path) -> dict[str, str | None]:
    """The git revision of the source tree and its uncommitted difference; null outside a git checkout.

    Of a copy that `launch submit` has made, those of the original.
    """
    with contextlib.suppress(OSError, json.JSONDecodeError):
        original: dict[str, str | None] = json.loads((repository / COPIED_REVISION).read_text(encoding="utf-8"))
        return original

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(repository), *arguments], capture_output=True, text=True, timeout=30, check=False
            )
        except OSError:
            return None
        return done.stdout if done.returncode == 0 else None

    revision = git("rev-parse", "HEAD")
    difference = git("diff", "HEAD") if revision else None
    return {"revision": revision.strip() if revision else None, "difference": without_passwords(difference)}


def environment_description() -> dict[str, Any]:
    """Versions and hardware that a result may depend on."""
    # Commands that only read folders of runs do without torch, whose import takes seconds.
    import torch

    packages = ("torch", "triton", "deepspeed", "hydra-core", "numpy", "pyarrow", "sentencepiece", "xlstm-pretrain")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu_count": os.cpu_count(),
        "gpus": devices,
        "packages": versions,
        "command": without_passwords(sys.argv),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
    }

"""A disk that fails at the k-th write of a save, for every k one after another, in one run.

What a save does to the disk is counted: files and folders that are made, what is written to them and flushed, renamed
and removed. The k-th of these fails as the system would have it, the next save succeeds, and then it is the k+1-th.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

import model.weights
from model.locate import complete_checkpoints, step_of
from train.callbacks.base import Callback
from train.checkpoints.reader import newest_usable
from train.decisions import CONTINUE, Decision, Stop
from train.trainer import Trainer

# A full disk stays full, and still lets go of files.
TAKES_ROOM = ("open", "write", "mkdir", "fsync")


class FailingDisk:
    """Below `run`, the folder of a run. Installed for good in this process, and harmless until it is armed."""

    def __init__(self, run: Path):
        self.checkpoints = os.fspath(run / "checkpoints")
        self.run = os.fspath(run)
        self.error = 0
        self._fails_at = 0
        self.count = 0
        # What failed first since it was armed; "" nothing.
        self.failed = ""
        self._lock = threading.Lock()
        self._install()

    def arm(self, number: int, error: int) -> None:
        """Let operation `number` from now on, from 1, fail with `error`."""
        self.error, self._fails_at, self.count, self.failed = error, number, 0, ""

    def disarm(self) -> None:
        self._fails_at = 0

    def meet(self, operation: str, path: str) -> None:
        """Raises OSError where `operation` is the one that fails, or the disk has been full since."""
        if not self._fails_at or not self._is_of_a_save(path):
            return
        with self._lock:
            self.count += 1
            is_full = self.error == errno.ENOSPC and self.failed and operation in TAKES_ROOM
            if self.count != self._fails_at and not is_full:
                return
            self.failed = self.failed or f"{operation} {path}"
        raise OSError(self.error, os.strerror(self.error), path)

    def _is_of_a_save(self, path: str) -> bool:
        if path.startswith(f"{self.checkpoints}/"):
            return True
        return threading.current_thread().name == "checkpoint-writer" and path.startswith(f"{self.run}/")

    def _install(self) -> None:
        events = {"os.rename": "rename", "os.remove": "remove", "os.mkdir": "mkdir", "os.rmdir": "rmdir"}

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
                self.meet("open", arguments[0])
            elif event in events:
                self.meet(events[event], _below_descriptor(os.fsdecode(arguments[0]), arguments[-1]))

        sys.addaudithook(hook)
        self._replace(os, "fsync", lambda descriptor: self.meet("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        plain_open = io.open

        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            found = plain_open(file, mode, *arguments, **options)
            is_path = isinstance(file, (str, os.PathLike))
            if is_path and set(mode) & set("wax+") and os.fspath(file).startswith(f"{self.run}/"):
                self._let_writes_fail(found, os.fspath(file))
            return found

        io.open = opened  # type: ignore[assignment]
        __builtins__["open"] = opened  # type: ignore[index]
        save_file = model.weights.save_file

        def save_tensors(tensors: Any, path: Any, metadata: Any) -> None:
            try:
                self.meet("write", os.fspath(path))
            except OSError as error:
                # As the library says it, with a file that is cut short.
                Path(path).write_bytes(b"\0" * 100)
                raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from None
            save_file(tensors, path, metadata=metadata)

        model.weights.save_file = save_tensors

    @staticmethod
    def _replace(module: Any, name: str, before: Callable[[Any], None]) -> None:
        plain = getattr(module, name)

        def replaced(first: Any) -> Any:
            before(first)
            return plain(first)

        setattr(module, name, replaced)

    def _let_writes_fail(self, file: Any, path: str) -> None:
        plain = file.write

        def write(data: Any) -> Any:
            try:
                self.meet("write", path)
            except OSError:
                plain(data[: len(data) // 2])
                raise
            return plain(data)

        file.write = write


def _below_descriptor(path: str, descriptor: object) -> str:
    if isinstance(descriptor, int) and descriptor >= 0 and not path.startswith("/"):
        return os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), path)
    return path


class FailingSaves(Callback):
    """Every other save of a run meets the disk's next failure, as long as there are any; then the run stops.

    `numbers`: which operations fail, one after another. `rank`: on which the disk is.
    """

    def __init__(self, run: Path, error: int, numbers: Iterable[int], rank: int = 0):
        self.run = run
        self.error = error
        self.rank = rank
        self._numbers = iter(numbers)
        self._disk: FailingDisk | None = None
        # What failed at each save that was to, and how often the run was told.
        self.failed: list[str] = []
        self.told = 0

    def on_run_start(self, trainer: Trainer) -> None:
        if trainer.mesh.rank == self.rank:
            self._disk = FailingDisk(self.run)

    def on_step_end(self, trainer: Trainer) -> Decision:
        told = self.told
        trainer.settle_save()
        if trainer.step % 2 == 0:
            if trainer.is_main and told == self.told:
                self._check_what_is_left(trainer)
            number = next(self._numbers, sys.maxsize)
            if self._disk is not None:
                self._disk.arm(number, self.error)
        elif trainer.step > 1:
            here = "" if self._disk is None else self._disk.failed
            failed = list(filter(None, trainer.mesh.gather_objects(here, group="world")))
            if self._disk is not None:
                self._disk.disarm()
            if not failed:
                return Stop("every write has failed")
            self.failed += failed
        return CONTINUE

    def on_save_failed(self, trainer: Trainer, problems: dict[int, str]) -> None:
        """An older checkpoint is whole and chosen, and nothing of what failed is taken for one."""
        if self._disk is not None:
            self._disk.disarm()
        self.told += 1

        def refuse(folder: Path, problem: str) -> None:
            raise AssertionError(f"{folder}: {problem}, after {problems}")

        newest = newest_usable(self.run / "checkpoints", trainer.mesh, refuse)
        assert newest is not None and step_of(newest) >= trainer.step - 2, (newest, trainer.step)
        if trainer.is_main:
            assert not list((self.run / "checkpoints").glob("*.partial")), problems

    def _check_what_is_left(self, trainer: Trainer) -> None:
        root, kept = self.run / "checkpoints", trainer.config.checkpoint.keep_last
        complete = complete_checkpoints(root)
        assert sorted(path.name for path in root.iterdir()) == [folder.name for folder in complete], self.failed[-1:]
        assert len(complete) <= kept and step_of(complete[-1]) == trainer.step - 1, self.failed[-1:]

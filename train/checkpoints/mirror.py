"""Brings every checkpoint of a run to its mirror, in the background. On rank 0 alone.

One copy at a time, the newest first; what is saved meanwhile waits, and of several that wait only the newest is copied.
A copy that fails is told of and made up for at the next save. Nothing here holds up the training, which goes on
whatever becomes of the mirror.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from conf.problems import other_format
from model.locate import complete_checkpoints, step_folder, step_of
from model.marker import COMPLETE
from train.checkpoints.layout import is_kept
from train.checkpoints.mirror_store import MirrorStore
from train.checkpoints.retention import Retention
from train.errors import RunError
from train.run_directory import Attempt, write_atomically

log = logging.getLogger(__name__)
_FORMAT_VERSION = 1


class _OvertakenError(Exception):
    """What is being copied is not wanted any more, or something else is wanted first."""


@dataclass(frozen=True)
class _Wish:
    """The checkpoint that is to be copied, and what stays at the mirror when it is there."""

    step: int
    retention: Retention


class VoidNote:
    """A file in the run's folder: which steps at the mirror were given up by a rollback and are still to be deleted.

    Without it a start would restore what the run went back from.
    """

    def __init__(self, path: Path):
        self._path = path
        # A rollback may come while the one before is being made up for.
        self._lock = threading.Lock()

    def write(self, step: int) -> None:
        """All steps after `step` are void; beside those that are so already."""
        with self._lock:
            before = self.read()
            step = step if before is None else min(step, before)
            write_atomically(self._path, json.dumps({"format_version": _FORMAT_VERSION, "void_after": step}) + "\n")

    def read(self) -> int | None:
        """The last step that is not void; None: nothing is void. Raises ValueError where the file says neither."""
        try:
            content = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return None
        step = content.get("void_after") if isinstance(content, dict) else None
        if type(step) is not int:
            raise ValueError(f"{self._path} does not say which steps of the mirror are void; restore it, or delete it")
        if problem := other_format(self._path, content.get("format_version"), _FORMAT_VERSION):
            raise ValueError(problem)
        return step

    def apply(self, store: MirrorStore) -> None:
        """Delete at the mirror what is void."""
        last = self.read()
        if last is None:
            return
        for step in store.steps():
            if step > last:
                store.remove(step)
        with self._lock:
            if self.read() == last:
                self._path.unlink()


class Mirror:
    """`keep_last`: how many of the newest stay there; None: as many as in the run's folder."""

    def __init__(
        self,
        store: MirrorStore,
        root: Path,
        note: VoidNote,
        attempt: Attempt,
        keep_last: int | None,
        on_copied: Callable[[int, float], None],
    ):
        self._store, self._root, self._note, self._attempt = store, root, note, attempt
        self._keep_last = keep_last
        self._on_copied = on_copied
        # Held while any of the following is looked at or changed.
        self._changed = threading.Condition()
        self._wish: _Wish | None = None
        # The step that is being copied, and whether the run has gone back from it meanwhile.
        self._copying: int | None = None
        self._is_void = False
        self._is_busy = False
        # Nothing is copied any more.
        self._has_ended = False
        self._problem: str | None = None
        self._thread: threading.Thread | None = None

    @property
    def has_problem(self) -> bool:
        """Whether something failed that nobody was told of."""
        return self._problem is not None

    @property
    def steps_in_use(self) -> frozenset[int]:
        """Whose files are being copied, or are about to be: they stay on the disk until then."""
        with self._changed:
            wish = None if self._wish is None else self._wish.step
            return frozenset(step for step in (self._copying, wish) if step is not None)

    def request(self, step: int, retention: Retention) -> None:
        """Copy the checkpoint of `step`, which is whole, and delete what need not stay beside it."""
        if self._keep_last is not None:
            retention = replace(retention, keep_last=self._keep_last)
        with self._changed:
            if self._has_ended:
                return
            self._wish = _Wish(step, retention)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint-mirror", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def rewind(self, step: int) -> None:
        """The run goes back: nothing after `step` is copied any more, and what is there goes. The training thread calls
        it before it deletes these checkpoints itself."""
        self._note.write(step)
        with self._changed:
            if self._wish is not None and self._wish.step > step:
                self._wish = None
            if self._copying is not None and self._copying > step:
                self._is_void = True

    def close(self) -> None:
        """Copy nothing any more; what is under way ends before its next piece, and counts for nothing."""
        with self._changed:
            self._has_ended = self._is_void = True
            self._changed.notify_all()

    def take_problem(self) -> str | None:
        """What failed since this was last asked."""
        with self._changed:
            problem, self._problem = self._problem, None
            return problem

    def settle(self, seconds: float) -> str | None:
        """Wait until all is copied, so long at most; returns what went wrong."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._is_busy or self._wish is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return (
                        f"{self._store.url} does not have the last checkpoint yet, after {max(0.0, seconds):g} s; the "
                        "next start goes on with the copy"
                    )
                self._changed.wait(left)
        return self.take_problem()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()
                while self._wish is None and not self._has_ended:
                    self._changed.wait()
                if self._has_ended or self._wish is None:
                    return
                wish, self._wish = self._wish, None
                self._is_busy, self._copying, self._is_void = True, wish.step, False
            try:
                self._bring(wish)
            except _OvertakenError:
                pass
            except RunError as error:
                # Another start has taken the run over, and its mirror with it.
                log.warning("%s", error)
                self._end(str(error))
                return
            except Exception as error:  # noqa: BLE001 - each file system has errors of its own
                with self._changed:
                    # What is void may have been deleted while it was read.
                    if not self._is_void:
                        self._problem = f"{self._store.url}: {self._store.shown(error)}"
            finally:
                self._set_copying(None)

    def _end(self, problem: str) -> None:
        with self._changed:
            self._has_ended, self._is_busy, self._wish, self._problem = True, False, None, problem
            self._changed.notify_all()

    def _set_copying(self, step: int | None) -> None:
        with self._changed:
            self._copying = step

    def _check(self) -> None:
        if self._is_void:
            raise _OvertakenError

    def _bring(self, wish: _Wish) -> None:
        self._attempt.check()
        self._note.apply(self._store)
        there = self._store.steps()
        if not self._has(wish.step, there):
            self._copy(wish.step)
        self._copy_lasting(wish, there)
        self._prune(wish)

    def _has(self, step: int, there: dict[int, bool]) -> bool:
        """Whether the checkpoint is at the mirror as it is here: a step that was trained again is another one."""
        if not there.get(step):
            return False
        return self._store.marker(step) == (step_folder(self._root, step) / COMPLETE).read_bytes()

    def _copy(self, step: int) -> None:
        started = time.monotonic()
        self._store.upload(step_folder(self._root, step), step, self._check)
        self._attempt.check()
        self._on_copied(step, time.monotonic() - started)

    def _copy_lasting(self, wish: _Wish, there: dict[int, bool]) -> None:
        """What stays when newer ones come, and is not there: the copy failed then, or there was no mirror yet."""
        here = {step_of(folder): folder for folder in complete_checkpoints(self._root)}
        wanted = [*wish.retention.lasting(sorted(here)), *(step for step, folder in here.items() if is_kept(folder))]
        for step in sorted(set(wanted), reverse=True):
            if step >= wish.step or there.get(step):
                continue
            with self._changed:
                if self._wish is not None:
                    raise _OvertakenError
                self._copying = step
            self._check()
            self._copy(step)

    def _prune(self, wish: _Wish) -> None:
        """As in the run's folder. What was cut short there goes too."""
        here = {step_of(folder): folder for folder in complete_checkpoints(self._root)}
        there = {step: is_marked for step, is_marked in self._store.steps().items() if step <= wish.step}
        surplus = wish.retention.surplus([step for step, is_marked in there.items() if is_marked])
        for step, is_marked in there.items():
            self._attempt.check()
            kept = step in here and is_kept(here[step])
            if not is_marked or (step in surplus and not kept and not self._store.is_kept(step)):
                with contextlib.suppress(FileNotFoundError):
                    self._store.remove(step)

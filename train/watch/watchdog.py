"""Watches over the processes of a run: who does not move is named, and a rank that fails takes the others with it.

A thread of each rank says on the board where its rank is, and compares what the others say. Whatever the threads that
train are busy with, or wait for, the run ends with a reason, for whoever watches, in events.jsonl and in the files that
each rank leaves (train.watch.ends).
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import itertools
import json
import logging
import os
import platform
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import FrameType

import psutil

from conf.passwords import without_passwords
from data_pipeline.network import REQUESTS
from train.parallel.board import Board, BoardError
from train.parallel.flight_recorder import recorded_collectives
from train.parallel.mesh import Mesh
from train.run_directory import Attempt, EventLog, RunDirectory
from train.watch.collectives import GroupRecord, as_json, describe_collectives, from_json, group_records
from train.watch.ends import GONE, HANG, SIGNAL, End, end_of, write_end
from train.watch.judgement import Beat, Culprit, Judge
from train.watch.whereabouts import END, LEFT, SAVE

log = logging.getLogger(__name__)

# What is on the board: of each rank its beat and its stack; of the run, who ended first.
_FIRST_END = "first end"
# Frames of these files wait for other ranks.
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", "/train/parallel/mesh.py")
# Innermost frames that are told of a rank.
_FRAMES = 12
# Seconds after which this process ends without what torch has recorded of NCCL.
_RECORDER_PATIENCE = 30.0
# Seconds between two beats, at most.
_INTERVAL = 1.0


class Watchdog:
    """Of one rank, from `start` to `close`, or to `fail`. It ends the process when another rank has failed or hangs.

    `seconds`: that a rank may stay in one phase of a step before it counts as hung, None for ever; `long_seconds`: in
    phases that may take long, such as the first of each kind.
    """

    def __init__(
        self,
        mesh: Mesh,
        attempt: Attempt,
        directory: RunDirectory,
        events: EventLog,
        seconds: float | None,
        long_seconds: float,
    ):
        self._mesh = mesh
        self._attempt = attempt.identity
        self._directory = directory
        self._events = events
        self._seconds = seconds
        self._judge = Judge(long_seconds if seconds is None else seconds, long_seconds)
        self._interval = min(_INTERVAL, (seconds or 10.0) / 10)
        # The process that started this one does not answer, so that nobody would start the run again.
        self.launcher_is_gone = False
        # For the board.
        self._patience = timedelta(seconds=10 if seconds is None else max(1.0, min(10.0, seconds / 4)))
        self._board: Board | None = None
        # When it first did not answer.
        self._board_lost: float | None = None
        self._numbers = itertools.count()
        self._host, self._process = platform.node(), os.getpid()
        self._created = psutil.Process().create_time()
        self._trainer = threading.get_ident()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        # Of ranks on this host, whether their processes could be found at first.
        self._found_here: dict[int, bool] = {}
        # What ranks tell rank 0 beside that, and what this one has told.
        self._notice = self._told_notice = ""
        self._notices: dict[int, str] = {}
        # Ranks whose network fails.
        self._in_trouble: set[int] = set()
        # Held by the thread that ends this rank.
        self._ending = threading.Lock()

    def start(self) -> None:
        """Watch from here on, for the thread that calls. Every rank starts."""
        try:
            self._board = self._mesh.open_board(f"watch/{self._attempt}", self._patience)
        except BoardError as error:
            self._lose_board(error)
        # What the operating system ends this process for, such as SIGSEGV or SIGABRT, leaves its stacks there.
        self._log = self._directory.log(self._mesh.rank).open("a", encoding="utf-8")
        self._told_faults = faulthandler.is_enabled()
        faulthandler.enable(self._log)
        self._say()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def meet(self) -> None:
        """To be called by all ranks when all have started: each sees the others once."""
        self._look(time.monotonic())
        self._gone()

    def post(self, notice: str) -> None:
        """Let rank 0 have this text in the place of the one before, within a second or two; for the thread that trains.
        Nobody waits for it."""
        self._notice = notice

    def notices(self) -> dict[int, str]:
        """On rank 0: what ranks have posted last, as far as it is known."""
        return self._notices if self._board is not None else {self._mesh.rank: self._notice}

    def close(self) -> None:
        """Leave the run in order: nobody waits for this rank any more."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        self._mesh.whereabouts.enter(LEFT)
        self._say()
        faulthandler.disable()
        if self._told_faults and sys.__stderr__ is not None:
            with contextlib.suppress(OSError, ValueError):
                faulthandler.enable(sys.__stderr__)
        self._log.close()

    def fail(self, error: BaseException) -> End | None:
        """This rank ends with `error`. Returns what ended the run, where that is something else.

        To be called by the thread that trains; waits a few seconds at most to hear what became of the others.
        """
        self._ending.acquire()
        self._closing.set()
        log.error("the run fails on this rank", exc_info=(type(error), error, error.__traceback__))
        elsewhere = self._end_elsewhere(error)
        own = end_of(error, self._mesh.rank, self._attempt, self._position)
        first = self._tell(elsewhere or own)
        self._leave_end(own, first)
        return None if first is own else first

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closing.wait(self._interval):
            now = time.monotonic()
            if now - last > 3 * self._interval + 1:
                # The machine slept, the process was stopped, or others were busy.
                self._judge.excuse(now - last)
            last = now
            self._say()
            first = self._first_end()
            if first is not None:
                self._follow(first)
                return
            self._look(now)
            # While the board does not answer nothing is known of the others.
            if self._seconds is not None and self._board_lost is None and (culprits := self._judge.culprits(now)):
                self._accuse(culprits)
                return
            if gone := self._gone():
                self._report_gone(gone)
                return

    def _say(self) -> None:
        """Tell the others where this rank is."""
        frame = sys._current_frames().get(self._trainer)
        stack = [] if frame is None else list(_frames(frame))
        waits = any(part in line for line in stack for part in _COLLECTIVES)
        beat = Beat(
            next(self._numbers),
            self._mesh.whereabouts.now,
            waits,
            self._host,
            self._process,
            self._created,
            REQUESTS.is_reading,
            without_passwords(REQUESTS.trouble),
        )
        if self._board is None:
            self._judge.see({self._mesh.rank: beat}, time.monotonic())
            self._report_trouble({self._mesh.rank: beat})
            return
        try:
            self._board.put(f"stack/{self._mesh.rank}", "\n".join(stack[-_FRAMES:]))
            self._board.put(f"beat/{self._mesh.rank}", beat.as_json())
            if (notice := self._notice) != self._told_notice:
                self._board.put(f"notice/{self._mesh.rank}", notice)
                self._told_notice = notice
            if self._board_lost is not None:
                self._judge.excuse(time.monotonic() - self._board_lost)
                self._board_lost = None
        except BoardError as error:
            self._lose_board(error)

    def _look(self, now: float) -> None:
        """See what all ranks say; nothing before all of them have said something."""
        if self._board is None:
            return
        try:
            beats = self._board.read([f"beat/{rank}" for rank in range(self._mesh.size)])
            if self._mesh.is_main and self._notice:
                notices = self._board.read([f"notice/{rank}" for rank in range(self._mesh.size)])
                self._notices = dict(enumerate(notices or []))
        except BoardError as error:
            self._lose_board(error)
            return
        if beats is not None:
            found = {rank: Beat.from_json(beat) for rank, beat in enumerate(beats)}
            self._judge.see(found, now)
            self._report_trouble(found)

    def _report_trouble(self, beats: Mapping[int, Beat]) -> None:
        """Make an event of a network that begins to fail, on rank 0; it is no hang as long as it is tried again."""
        if not self._mesh.is_main:
            return
        for rank, beat in beats.items():
            if beat.trouble and rank not in self._in_trouble:
                step = beat.position.step if beat.position.turn else None
                words = {"rank": rank, "host": beat.host, "problem": beat.trouble}
                # A disk may be full, and nobody may read what is said.
                with contextlib.suppress(OSError, ValueError):
                    self._events.append("network", step=step, **words)
                    print(f"WARNING    rank {rank} on {beat.host}: {beat.trouble}", file=sys.stderr, flush=True)
        self._in_trouble = {rank for rank, beat in beats.items() if beat.trouble}

    def _lose_board(self, error: BoardError) -> None:
        """The board does not answer. Where the launcher has it, this rank goes on and watches itself alone; otherwise
        it is in the process of rank 0, which is hung as well when this goes on."""
        now = time.monotonic()
        self._board_lost = now if self._board_lost is None else self._board_lost
        since = now - self._board_lost
        if self._board is not None and since <= self._judge.seconds:
            return
        server = self._judge.present().get(0)
        is_leaving = self._mesh.whereabouts.now.phase in (SAVE, END, LEFT)
        is_of_rank = self._board is not None and not self._board.is_of_launcher
        if is_of_rank and server is not None and not is_leaving and self._seconds is not None:
            self._accuse([Culprit(0, server, since, is_silent=True)])
        log.warning("the board of the run's processes is lost, this rank watches itself alone: %s", error)
        self.launcher_is_gone = self._board is not None and self._board.is_of_launcher
        self._board = self._board_lost = None
        self._judge.forget_all_but(self._mesh.rank)

    def _first_end(self) -> End | None:
        """What ended the run, by the board: of another rank, or what another says of this one."""
        if self._board is None:
            return None
        try:
            found = self._board.read([_FIRST_END])
        except BoardError as error:
            self._lose_board(error)
            return None
        return None if found is None else End.from_json(json.loads(found[0]))

    def _gone(self) -> tuple[int, Beat] | None:
        """A rank of this host whose process is there no more."""
        for rank, beat in self._judge.present().items():
            if beat.host == self._host:
                is_there = _is_there(beat)
                # Processes of another container have numbers that mean nothing here: those were never found.
                if self._found_here.setdefault(rank, is_there) and not is_there:
                    return rank, beat
        return None

    def _accuse(self, culprits: list[Culprit]) -> None:
        """The run ends because these ranks hold it up. Does not return where this thread ends the process."""
        if not self._ending.acquire(blocking=False):
            return
        first = culprits[0]
        message = f"{'; '.join(map(str, culprits))} (watchdog.seconds={self._seconds:g})"
        end = self._end_of_other(first.rank, first.beat, HANG, message)
        self._end_process(end)

    def _report_gone(self, gone: tuple[int, Beat]) -> None:
        rank, beat = gone
        # Its own words, where it had any, are on the board by now; and where it left in order, that.
        time.sleep(self._interval)
        self._look(time.monotonic())
        if rank not in self._judge.present() or not self._ending.acquire(blocking=False):
            return
        self._end_process(self._first_end() or self._end_of_gone(rank, beat))

    def _follow(self, first: End) -> None:
        """Another rank has ended the run: so does this one, by itself or, soon, by this thread."""
        if not self._closing.wait(self._interval) and self._ending.acquire(blocking=False):
            self._end_process(first)

    @property
    def _grace(self) -> float:
        """Seconds that others have to say something before this rank ends."""
        return 3 * self._interval + 0.5

    def _end_process(self, first: End) -> None:
        """Leave stacks, tell of the first end, and end this process; the thread that trains may never answer."""
        with contextlib.suppress(OSError):
            self._log.write(f"This rank ends: {without_passwords(first.message)}. Where its threads are:\n")
            self._log.flush()
            faulthandler.dump_traceback(self._log, all_threads=True)
        frame = sys._current_frames().get(self._trainer)
        stack = "" if frame is None else "\n".join(_frames(frame))
        told = self._tell(first)
        self._leave_end(self._end(HANG, told.message, stack), told)
        if told is first:
            words = f"train: {without_passwords(first.message)}; the run ends. Where every rank was: "
            print(f"{words}{self._directory.logs}/", file=sys.stderr, flush=True)
        deadline = time.monotonic() + self._grace
        has_told = first.kind in (HANG, GONE) and self._can(self._tell_collectives)
        time.sleep(max(0.0, deadline - time.monotonic()))
        if has_told:
            self._can(self._log_collectives)
        self._wake(first)
        os._exit(1)

    def _can(self, action: Callable[[], bool]) -> bool:
        """What `action` returns; False where it fails: this process ends in any case."""
        try:
            return action()
        # The format of what is read is torch's own. Logging may wait for a thread that hangs.
        except Exception:
            with contextlib.suppress(OSError):
                self._log.write(traceback.format_exc())
            return False

    def _tell_collectives(self) -> bool:
        """Leave what this rank's recorder has of NCCL, and let the others know; False where there is none."""
        # A driver that hangs may hang whoever asks, with every thread of this process.
        faulthandler.dump_traceback_later(_RECORDER_PATIENCE, exit=True, file=self._log)
        try:
            dump = recorded_collectives()
        finally:
            faulthandler.cancel_dump_traceback_later()
        if dump is None:
            return False
        path = self._directory.collectives(self._mesh.rank, self._attempt)
        for earlier in path.parent.parent.glob("nccl-*"):
            if earlier != path.parent:
                shutil.rmtree(earlier, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(dump)
        if self._board is not None:
            self._board.put(f"collectives/{self._mesh.rank}", as_json(group_records(dump)))
        return True

    def _log_collectives(self) -> bool:
        """Write down who waits in which collective, and who has not entered it."""
        of_ranks: dict[int, list[GroupRecord]] = {}
        for rank in range(self._mesh.size):
            if self._board is not None and (found := self._board.read([f"collectives/{rank}"])) is not None:
                of_ranks[rank] = from_json(found[0])
        lines = describe_collectives(of_ranks, self._mesh.size)
        self._log.write("".join(f"{line}\n" for line in ["Collectives that are not done:", *lines]))
        self._log.flush()
        return True

    def _wake(self, first: End) -> None:
        """A process of this host that was stopped goes on, to find that the others have ended, and to end."""
        if first.host == self._host and first.process != self._process:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(first.process, signal.SIGCONT)

    def _end_elsewhere(self, error: BaseException) -> End | None:
        """The end of another rank that `error` follows from."""
        if self._mesh.size == 1:
            return None
        if type(error) is not RuntimeError and not _is_of_collective(error):
            return self._first_end()
        # A collective that failed, or a fault of this rank's own.
        deadline = time.monotonic() + self._grace
        while True:
            if (first := self._first_end()) is not None:
                return first
            now = time.monotonic()
            self._look(now)
            if (gone := self._gone()) is not None:
                return self._end_of_gone(*gone)
            silent = [rank for rank in self._judge.silent(2.5 * self._interval, now) if rank != self._mesh.rank]
            if now > deadline:
                if not silent:
                    return None
                return self._end_of_gone(silent[0], self._judge.present()[silent[0]])
            time.sleep(self._interval / 4)

    def _end_of_gone(self, rank: int, beat: Beat) -> End:
        message = (
            f"{beat.describe(rank)} is gone without a word, as after SIGKILL, or where the machine's memory was out; "
            f"it was last seen in {beat.position}"
        )
        return self._end_of_other(rank, beat, GONE, message)

    def _end_of_other(self, rank: int, beat: Beat, kind: str, message: str) -> End:
        stack = ""
        if self._board is not None:
            with contextlib.suppress(BoardError):
                stack = "".join(self._board.read([f"stack/{rank}"]) or [])
        return End(self._attempt, rank, beat.process, beat.host, time.time(), kind, message, stack, str(beat.position))

    @property
    def _position(self) -> str:
        whereabouts = self._mesh.whereabouts
        return str(whereabouts.failed_at or whereabouts.now)

    def _end(self, kind: str, message: str, stack: str) -> End:
        who = (self._attempt, self._mesh.rank, self._process, self._host)
        return End(*who, time.time(), kind, message, stack, self._position)

    def leave(self, reason: str) -> None:
        """This rank is about to end because of a signal, outside of its steps."""
        self._leave_end(self._end(SIGNAL, reason, ""))

    def _leave_end(self, end: End, first: End | None = None) -> None:
        """Write the end of this rank. The folder may be what is wrong: not there, not writable, full."""
        if first is not None and first.rank != end.rank:
            end = dataclasses.replace(end, because_of=first.rank)
        with contextlib.suppress(OSError):
            write_end(self._directory, end)

    def _tell(self, first: End) -> End:
        """Let the other ranks and the run's events know what ended the run; returns what a rank said of it before."""
        if self._board is not None:
            with contextlib.suppress(BoardError):
                self._board.put_first(_FIRST_END, first.as_json())
        with contextlib.suppress(OSError):
            if (told := self._events.append_failure(**first.as_event())) is not None:
                return End.from_event(told)
        return first


def _frames(frame: FrameType) -> Iterator[str]:
    """The frames of a thread, outermost first, one line each."""
    for summary in traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)[::-1]:
        yield f"{summary.filename}:{summary.lineno} in {summary.name}"


def _is_of_collective(error: BaseException) -> bool:
    """Whether an exception was raised by what moves tensors between ranks."""
    return type(error).__module__.startswith("torch.") or any(
        part in frame.filename for frame in traceback.extract_tb(error.__traceback__) for part in _COLLECTIVES
    )


def _is_there(beat: Beat) -> bool:
    """Whether the process of a rank on this host lives."""
    try:
        process = psutil.Process(beat.process)
        # The clock, from which it is computed, may have been set.
        is_the_same = abs(process.create_time() - beat.created) < 60
        return is_the_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True

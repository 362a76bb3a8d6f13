"""`python -m launch sweep submit --local`: the runs of a sweep on this machine, one after another."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from conf import ConfigError
from conf.lasting_output import lasting_output
from conf.passwords import without_passwords
from data_pipeline.errors import DataError
from launch import slurm
from launch.attempts import DONE as RUN_DONE
from launch.attempts import GIVEN_UP, GO_ON, Answer, close_attempt, open_attempt
from launch.folder import LaunchFolder
from launch.job import LaunchConfig
from launch.sweep.manifest import Manifest, Row, SweepFolder, named
from launch.sweep.progress import (
    DONE,
    FAILED,
    RUNNING,
    WAITING,
    Progress,
    progress,
    progress_of,
    queue_of,
    reasons,
    summary,
)
from launch.sweep.rows import configs_of, prepare
from model.weights import WeightsError
from train.checkpoints.layout import CheckpointError
from train.command import Command
from train.config import RunConfig
from train.stop_requests import SignalListener, answered_signals, is_lost_terminal

# Seconds that a run which is under way when it is to be started may take to end.
PATIENCE = 60.0
# What the processes of an attempt print goes to this file of the attempt's folder.
LOG = "local.out"


@dataclass(frozen=True)
class LocalOptions:
    """How runs are started here."""

    # Of each run; None: as planned.
    processes: int | None = None
    # After so many the run under way saves and ends, and no further one begins; None: no limit.
    minutes: float | None = None


def run_locally(folder: SweepFolder, manifest: Manifest, launch: LaunchConfig, options: LocalOptions) -> int:
    """Start every run that is neither complete nor under way; returns 0 when all of the sweep are complete, else 1.

    A run that fails is named, and the next one begins. Raises ConfigError where runs do not work as they were planned.
    """
    _refuse_too_few_gpus(manifest, options.processes)
    queue = queue_of(folder, manifest)
    ahead = [one.row for one in progress(folder, manifest, queue) if one.state != DONE]
    configs = configs_of(folder, ahead, options.processes)
    with holding(folder), lasting_output() as output, _Interrupts(options.minutes, output.lose_terminal) as interrupts:
        for row in _in_turn(folder, manifest, queue):
            if interrupts.is_late:
                break
            _say(f"[{manifest.rows.index(row) + 1}/{len(manifest.rows)}] {row.name}: {row.steps:,} steps")
            if not _run(folder, row, configs[row.name], launch, options.processes or row.processes):
                _say(f"{'the time is over' if interrupts.is_late else 'interrupted'}; the same command goes on")
                break
        found = progress(folder, manifest, queue)
    _say("\n".join([summary(found), *reasons(found)]))
    return 0 if all(one.state == DONE for one in found) else 1


def _refuse_too_few_gpus(manifest: Manifest, processes: int | None) -> None:
    gpus, wanted = torch.cuda.device_count(), processes or max((row.processes for row in manifest.rows), default=0)
    if 0 < gpus < wanted:
        raise ConfigError(
            [
                f"--processes: {wanted} processes do not find a GPU each among the {gpus} of this machine; give "
                f"--processes {gpus}, or plan the sweep with gpus_per_node={gpus}"
            ]
        )


def _in_turn(folder: SweepFolder, manifest: Manifest, queue: Sequence[slurm.QueuedJob] | None) -> Iterator[Row]:
    """The holes, each when its turn comes: trunks before branches, and last what is still under way at first.

    A run whose launcher was killed saves and ends by itself, within seconds.
    """
    ahead, deadline = list(manifest.rows), time.monotonic() + PATIENCE
    while ahead:
        later = []
        for row in ahead:
            states = [progress_of(folder, one, queue).state for one in _with_trunk(manifest, row)]
            if RUNNING in states:
                later.append(row)
            elif states[0] in (FAILED, WAITING) and set(states[1:]) <= {DONE}:
                yield row
                deadline = time.monotonic() + PATIENCE
        if later == ahead:
            if time.monotonic() > deadline:
                _say(f"{named([row.name for row in later])}: under way elsewhere, or behind a run that is")
                return
            time.sleep(1.0)
        ahead = later


def _with_trunk(manifest: Manifest, row: Row) -> list[Row]:
    return [row] if row.parent is None else [row, manifest.row(row.parent)]


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def _run(folder: SweepFolder, row: Row, config: RunConfig, launch: LaunchConfig, processes: int) -> bool:
    """Train a row to its end, in several attempts where it fails; False where it was asked to stop."""
    began = time.monotonic()
    try:
        run = prepare(folder, row, config, launch, processes)
    except OSError as error:
        # The next one may have more luck: of a file in the way of its folder it has none.
        _say(f"{row.name}: FAILED: {error}")
        return True
    while True:
        answer = _attempt(run, row, processes)
        if answer is None:
            return False
        if answer.code != GO_ON:
            word = "" if answer.code == RUN_DONE else f"FAILED: {answer.text}; "
            _say(f"{row.name}: {word}{_told(progress_of(folder, row))}, {time.monotonic() - began:.0f} s")
            return True


def _attempt(run: LaunchFolder, row: Row, processes: int) -> Answer | None:
    """Train until the run is complete, fails, or is asked to stop; returns what follows, None in the last case."""
    # Importing it takes seconds, and every file of the package is imported by the command line.
    from launch.local import train_locally

    answer = open_attempt(run)
    if answer.code != GO_ON:
        return answer
    log = run.logs(int(answer.text)) / LOG
    try:
        code = train_locally(Command([f"name={row.name}"], config=run.config), processes, log)
    except (DataError, CheckpointError, WeightsError, OSError, ValueError) as error:
        # Before any process of the run has begun.
        log.write_text(f"{error}\n", encoding="utf-8")
        why = "; ".join(error.problems) if isinstance(error, ConfigError) else str(error)
        reason = f"the run cannot start: {without_passwords(why)}"
        run.note("given_up", reason=reason)
        return Answer(GIVEN_UP, reason)
    answer = close_attempt(run, code)
    # Ended well and not complete: it was asked to stop, however few attempts it has.
    return None if code == 0 and answer.code != RUN_DONE else answer


def _told(one: Progress) -> str:
    scored = [(name, last["loss"]) for name, last in one.found["held_out"].items() if last["loss"] is not None]
    return ", ".join([f"{one.found['steps']:,} steps", *(f"{name} {loss:.4f}" for name, loss in scored)])


@contextmanager
def holding(folder: SweepFolder) -> Iterator[None]:
    """Of two commands that would start the same runs, the second is refused. Raises ConfigError."""
    with folder.lock.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                [
                    f"{folder.path}: is being started by {file.read().strip() or 'another process'}; wait for it, or "
                    "end it"
                ]
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


class _Interrupts:
    """What asks the sweep to stop: signals between two runs, and its own clock. During a run signals go to that."""

    def __init__(self, minutes: float | None, lose_terminal: Callable[[str], object]):
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._lose_terminal = lose_terminal
        self._timer: threading.Timer | None = None

    @property
    def is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def __enter__(self) -> _Interrupts:
        self._listener = SignalListener(answered_signals(), self._answer)
        self._listener.__enter__()
        if self._deadline is not None:
            self._timer = threading.Timer(self._deadline - time.monotonic(), os.kill, (os.getpid(), signal.SIGUSR1))
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._listener.__exit__(None, None, None)

    def _answer(self, number: signal.Signals) -> None:
        if is_lost_terminal(number):
            self._lose_terminal(number.name)
            return
        # Nothing is under way that has something to save.
        _say(f"stopped by {number.name} between two runs; the same command goes on")
        os._exit(1)

"""The one thread that drives the running batch; the event loop sends it jobs and gets their tokens.

Nothing waits: what the loop sends lies in a queue that is emptied between two steps, and what the steps give is handed
over with `call_soon_threadsafe`, once a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from model.generation.batch import ContinuousBatch, Token
from model.generation.sampling import SamplingSettings

log = logging.getLogger(__name__)


class Job(Protocol):
    """A sequence to continue. Its methods are called in the thread of the event loop."""

    @property
    def prompt_tokens(self) -> Sequence[int]: ...

    @property
    def settings(self) -> SamplingSettings: ...

    def take(self, tokens: Sequence[Token]) -> None:
        """What one step gave, in order."""

    def fail(self, error: Exception) -> None:
        """No token will come any more."""


@dataclass(frozen=True)
class Occupancy:
    """Sequences in the batch, as of its last step."""

    waiting: int
    running: int
    free_slots: int


class BatchWorker:
    """Runs `batch` in a thread of its own."""

    def __init__(self, batch: ContinuousBatch):
        self._batch = batch
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="batch", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_failure: Callable[[], None] = lambda: None
        # Of the batch's thread alone.
        self._handles: dict[Job, int] = {}
        self._jobs: dict[int, Job] = {}
        self._publish()
        # What ended the thread before it was told to.
        self.failure: Exception | None = None

    def start(self, loop: asyncio.AbstractEventLoop, on_failure: Callable[[], None]) -> None:
        """Begin. `on_failure` is called in the loop's thread when a step fails: the batch is lost then."""
        self._loop, self._on_failure = loop, on_failure
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._commands.put(lambda: self._add(job))

    def cancel(self, job: Job) -> None:
        """Its slot is free before the next step; one that has ended, or never began, is left as it is."""
        self._commands.put(lambda: self._drop(job))

    def stop(self) -> None:
        """End the thread behind the step that runs, and wait for it."""
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self._jobs:
                    self._hand_over(self._batch.step())
                self._publish()
        except Exception as error:
            log.exception("the batch failed; every sequence in it is lost")
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.failure = error
        for job in self._jobs.values():
            self._call(job.fail, error)
        self._jobs.clear()
        self._handles.clear()
        self._call(self._on_failure)
        # What is sent from now on is refused at once, until the thread is told to stop.
        while self._take_commands():
            pass

    def _take_commands(self) -> bool:
        """Do what was sent, waiting for it while there is nothing else to do; False: stop."""
        wait = not self._jobs
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _add(self, job: Job) -> None:
        if self.failure is not None:
            self._call(job.fail, self.failure)
            return
        try:
            handle = self._batch.add(job.prompt_tokens, job.settings)
        except ValueError as error:
            self._call(job.fail, error)
            return
        self._jobs[handle], self._handles[job] = job, handle

    def _drop(self, job: Job) -> None:
        handle = self._handles.pop(job, None)
        if handle is not None:
            del self._jobs[handle]
            self._batch.cancel(handle)

    def _hand_over(self, tokens: Sequence[Token]) -> None:
        by_job: dict[Job, list[Token]] = defaultdict(list)
        for token in tokens:
            job = self._jobs[token.request]
            by_job[job].append(token)
            if token.finish_reason is not None:
                del self._jobs[token.request], self._handles[job]
        if by_job:
            self._call(_deliver, dict(by_job))

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        # The loop is closed when the server ends while a step runs: nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def _publish(self) -> None:
        """Tell other threads how the batch is; each value is replaced as a whole."""
        self.occupancy = Occupancy(self._batch.waiting, self._batch.running, self._batch.free_slots)
        # Of one sequence. It does not grow with the text but for attention, whose caches get more room when they must.
        self.state_bytes = self._batch.state_bytes_per_slot


def _deliver(by_job: dict[Job, list[Token]]) -> None:
    for job, tokens in by_job.items():
        job.take(tokens)

"""Signals that ask a run to stop: answered at once, from a thread, whatever the main thread is busy with."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

from conf.lasting_output import LastingOutput

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
Answer = Callable[[signal.Signals], None]


class SignalListener:
    """Calls `answer` in a thread of its own when one of `numbers` arrives, and `note` in the main thread once that gets
    to it. For the main thread only; a listener inside another takes its place until it is left.

    A handler of Python's alone would wait for the operation under way, which may be a step of minutes.
    """

    def __init__(self, numbers: Sequence[signal.Signals], answer: Answer, note: Answer = lambda number: None):
        self._numbers = numbers
        self._answer = answer
        self._note = note
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalListener:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        signal.set_wakeup_fd(self._wakeup_before)
        # Ends the thread, which closes the other end.
        os.close(self._writer)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(signal.Signals(number))

    def _listen(self) -> None:
        while received := os.read(self._reader, 64):
            for number in received:
                if number in self._numbers:
                    self._answer(signal.Signals(number))
        os.close(self._reader)


def _leave_the_parents_pipe() -> None:
    """A copy of this process must not tell its parent of the signals that it gets itself."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_the_parents_pipe)


def answered_signals() -> tuple[signal.Signals, ...]:
    """SIGNALS, and SIGHUP unless it is ignored, as under nohup."""
    return SIGNALS if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (*SIGNALS, signal.SIGHUP)


def is_lost_terminal(number: signal.Signals) -> bool:
    """Whether a signal says that the terminal is gone. From torchrun SIGHUP says that torchrun itself will end."""
    return number == signal.SIGHUP and "TORCHELASTIC_RUN_ID" not in os.environ


def tell(text: str) -> None:
    """Say something to whoever watches, on the rank that speaks for all; on a terminal below the bar."""
    if os.environ.get("RANK", "0") == "0":
        print(f"\n{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


class OutsideTraining:
    """What a request means while no step is taken: during imports and set-up, and after the last step.

    A process alone ends at once: it has nothing to save. One of several would leave the others waiting once they have
    met; it keeps the request for the first step, and ends at once when asked again. One that has failed finds out why
    before it ends.
    """

    def __init__(self) -> None:
        self._phase = "before the first step"
        self._others_wait = False
        self._kept: list[str] = []
        # When the first of these came, by the monotonic clock.
        self._kept_since = 0.0
        self._exit_code = 0
        # Told why the process ends, before it does.
        self.on_end: Callable[[str], None] | None = None

    def answer(self, number: signal.Signals, output: LastingOutput) -> None:
        """To be called by the thread of a `SignalListener`."""
        if is_lost_terminal(number):
            output.lose_terminal(number.name)
        elif self._others_wait and not self._kept:
            self._kept_since = time.monotonic()
            self._kept.append(number.name)
            tell(
                f"{number.name}: the run's processes are starting together; the run ends after its first step, with a "
                "checkpoint. Asked again, it ends at once."
            )
        elif self._exit_code and not self._kept:
            self._kept.append(number.name)
            tell(f"{number.name}: the run has failed and is about to end. Asked again, it ends at once.")
        else:
            reason = f"stopped by {number.name} {self._phase}"
            tell(f"train: {reason}; the same command goes on.")
            if self.on_end is not None and not self._exit_code:
                self.on_end(reason)
            os._exit(self._exit_code)

    def processes_met(self, count: int) -> None:
        """From now on `count` processes depend on each other."""
        self._others_wait = count > 1

    @property
    def seconds_since_kept(self) -> float:
        """Since the first request came that is kept."""
        return time.monotonic() - self._kept_since

    def begin_training(self) -> list[str]:
        """The requests that were kept."""
        kept, self._kept = self._kept, []
        return kept

    def end_training(self, has_failed: bool = False) -> None:
        """Every step is taken, and what they are worth is saved; or training has failed."""
        self._phase, self._others_wait = "after a failure" if has_failed else "after the last step", False
        self._exit_code, self._kept = int(has_failed), []


OUTSIDE_TRAINING = OutsideTraining()

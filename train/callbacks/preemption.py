"""A signal from the scheduler or the keyboard ends the run at the next step, with a checkpoint.

The request is answered at once, from a thread. SIGHUP means a lost terminal, and the run goes on without it. A launcher
that is gone ends the run as well: without it the job is over, and another start would find the folder in use.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

from train.callbacks.base import Callback
from train.decisions import CONTINUE, Decision, Stop
from train.stop_requests import OUTSIDE_TRAINING, SignalListener, answered_signals, is_lost_terminal, tell

if TYPE_CHECKING:
    from train.trainer import Trainer

# Seconds between two answers to requests that keep coming.
_ANSWER_INTERVAL = 1.0


class Preemption(Callback):
    """Answers signals while the run goes on, in the main thread only; elsewhere they keep their handlers."""

    def __init__(self) -> None:
        self._listener: SignalListener | None = None
        self._answers = 0
        self._last_answer = 0.0

    def on_run_start(self, trainer: Trainer) -> None:
        if threading.current_thread() is not threading.main_thread():
            return

        def note(number: signal.Signals) -> None:
            if not is_lost_terminal(number):
                trainer.wish(Stop(number.name))

        self._listener = SignalListener(answered_signals(), lambda number: self._answer(trainer, number), note)
        self._listener.__enter__()
        since = OUTSIDE_TRAINING.seconds_since_kept
        for name in OUTSIDE_TRAINING.begin_training():
            trainer.deadline.request(since)
            trainer.wish(Stop(name))

    def on_step_end(self, trainer: Trainer) -> Decision:
        watchdog = trainer.context.watchdog
        return Stop("the launcher is gone") if watchdog is not None and watchdog.launcher_is_gone else CONTINUE

    def _answer(self, trainer: Trainer, number: signal.Signals) -> None:
        """Say what will happen. In a thread of its own, while a step may be under way."""
        if is_lost_terminal(number):
            trainer.context.output.lose_terminal(number.name)
            return
        if self._answers > 1 and time.monotonic() - self._last_answer < _ANSWER_INTERVAL:
            return
        self._answers += 1
        self._last_answer = time.monotonic()
        if self._answers == 1:
            left = trainer.deadline.left()
            limit = "" if left is None else f", if that can be done in the {max(0.0, left):.0f} s that are left,"
            tell(
                f"{number.name}: the run finishes the step under way (step {trainer.step + 1} of "
                f"{trainer.total_steps:,}), saves a checkpoint{limit} and ends. Asking again changes nothing."
            )
            trainer.events.append("stop_request", step=trainer.step, reason=number.name)
        else:
            tell(
                f"{number.name}: still at it, after {trainer.step:,} steps. To end at once, and lose what was not "
                f"saved: kill -9 {os.getpid()}"
            )

    def on_run_end(self, trainer: Trainer, outcome: str) -> None:
        if self._listener is not None:
            self._listener.__exit__(None, None, None)
            self._listener = None
            OUTSIDE_TRAINING.end_training(outcome == "failed")

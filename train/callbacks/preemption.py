"""A signal from the scheduler or the keyboard ends the run at the next step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

from train.callbacks.base import Callback
from train.decisions import Stop

if TYPE_CHECKING:
    from train.trainer import Trainer

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Preemption(Callback):
    """Answers SIGNALS while the run goes on, in the main thread only; elsewhere they keep their handlers."""

    def __init__(self) -> None:
        self._previous: dict[signal.Signals, Any] = {}

    def on_run_start(self, trainer: Trainer) -> None:
        if threading.current_thread() is not threading.main_thread():
            return

        def ask_to_stop(received: int, frame: FrameType | None) -> None:
            trainer.wish(Stop(signal.Signals(received).name))

        for number in SIGNALS:
            self._previous[number] = signal.signal(number, ask_to_stop)

    def on_run_end(self, trainer: Trainer, outcome: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

"""A signal from the scheduler or the keyboard ends the run at the next step, with a checkpoint."""

from __future__ import annotations

import signal
import threading

from train.callbacks.base import Callback

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Preemption(Callback):
    def __init__(self) -> None:
        self._previous: dict[signal.Signals, object] = {}

    def on_run_start(self, trainer) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            self._previous[number] = signal.signal(
                number, lambda received, _: trainer.request_stop(signal.Signals(received).name)
            )

    def on_run_end(self, trainer, outcome: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

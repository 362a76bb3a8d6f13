"""A run that is asked to stop while it has a checkpoint of step 4, or is writing it.

Arguments: seconds that an earlier save is said to have taken (0: none has), the rank that gets the signal, how the save
of step 4 goes (there, near its end, far from it), and settings of the run.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from conf import compose
from tests.train.plain_engine import PlainEngine
from train.__main__ import end_process
from train.callbacks.base import Callback
from train.checkpoints import writer
from train.config import RunConfig
from train.decisions import CONTINUE, Decision
from train.run import make_engine, train
from train.trainer import Trainer
from train.watch.whereabouts import END, SAVE

STEP = 4


class SignalledAt(Callback):
    """Sends this process SIGTERM when the checkpoint of step 4 is there, or just before it is begun."""

    def __init__(self, seconds: float, rank: int, how: str):
        self._seconds, self._rank, self._how = seconds, rank, how
        self._go_on = threading.Event()

    def on_run_start(self, trainer: Trainer) -> None:
        if self._seconds:
            trainer.saves.seconds.append(self._seconds)

    def on_step_end(self, trainer: Trainer) -> Decision:
        if trainer.step == STEP and self._how != "there":
            trainer.settle_save()
            self._hold_save(trainer)
            self._signal(trainer)
        return CONTINUE

    def on_step_start(self, trainer: Trainer) -> None:
        if trainer.step == STEP and self._how == "there":
            trainer.settle_save()
            self._signal(trainer)

    def _hold_save(self, trainer: Trainer) -> None:
        write = writer._Snapshot.write

        def held(snapshot, *arguments):
            self._go_on.wait()
            return write(snapshot, *arguments)

        writer._Snapshot.write = held
        if self._how == "near":
            threading.Thread(target=self._let_go_at_the_end, args=(trainer,), daemon=True).start()

    def _let_go_at_the_end(self, trainer: Trainer) -> None:
        # The last thing that the run does is to wait for the save.
        while trainer.step == STEP or trainer.mesh.whereabouts.now.phase not in (END, SAVE):
            time.sleep(0.01)
        time.sleep(0.2)
        self._go_on.set()

    def _signal(self, trainer: Trainer) -> None:
        if trainer.mesh.rank == self._rank:
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    said, receiver, how, *overrides = sys.argv[1:]
    config = compose(RunConfig, "train", overrides)
    engine = PlainEngine if config.parallel.zero_stage == 0 else make_engine
    end_process(train(config, [SignalledAt(float(said), int(receiver), how)], engine))

"""`python -m train` of which one rank gets into trouble: troubled_train.py RANK KIND STEP OVERRIDE...

main([...])    RANK: -1 for all. KIND: what it does at the beginning of step STEP, by TROUBLES; after a colon the part
               of a step in which it does so, instead: "sleep:forward"
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable as Function

import torch

import train.run
from train.callbacks.base import Callback
from train.run import make_callbacks
from train.trainer import Trainer

# In the run's folder: when the trouble began, in seconds since 1970.
BEGINNING = "trouble.txt"


def _raise() -> None:
    raise KeyError("of no class that is expected")


def _sleep() -> None:
    while True:
        time.sleep(60)


def _stop_when_seen() -> None:
    """What the rank says of itself until then is this."""
    time.sleep(2.5)
    os.kill(os.getpid(), signal.SIGSTOP)


def _take_all_memory() -> None:
    torch.empty(2**50, dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")


def _lag() -> None:
    time.sleep(0.25)


TROUBLES: dict[str, Function[[], None]] = {
    "raise": _raise,
    "sleep": _sleep,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "stop_when_seen": _stop_when_seen,
    # At every step from then on.
    "lag": _lag,
    "take_all_memory": _take_all_memory,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "abort": os.abort,
}


class Trouble(Callback):
    """Of one rank, at one step."""

    def __init__(self, rank: int, kind: str, step: int):
        self._rank, self._kind, self._step = rank, kind, step

    def on_step_start(self, trainer: Trainer) -> None:
        is_due = trainer.step == self._step or (self._kind == "lag" and trainer.step > self._step)
        if self._rank in (trainer.mesh.rank, -1) and is_due:
            trouble, _, part = self._kind.partition(":")
            (trainer.run_directory / BEGINNING).write_text(str(time.time()))
            if part:
                trainer.model.register_forward_pre_hook(lambda *_: TROUBLES[trouble]())
            else:
                TROUBLES[trouble]()


def main(arguments: list[str]) -> int:
    rank, kind, step, *overrides = arguments
    train.run.make_callbacks = lambda config, more=(): make_callbacks(config, [Trouble(int(rank), kind, int(step))])
    from train.__main__ import main as train_main

    return train_main(overrides)


if __name__ == "__main__":
    from train.__main__ import end_process

    end_process(main(sys.argv[1:]))

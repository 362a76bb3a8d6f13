"""`python -m train` of which one rank gets into trouble: troubled_train.py RANK KIND STEP OVERRIDE...

main([...])    KIND: what the rank does at the beginning of step STEP, by TROUBLES; after a colon the part of a step
               in which it does so, instead: "sleep:forward"
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable as Function

import train.run
from train.callbacks.base import Callback
from train.run import make_callbacks
from train.trainer import Trainer


def _raise() -> None:
    raise KeyError("of no class that is expected")


def _sleep() -> None:
    while True:
        time.sleep(60)


TROUBLES: dict[str, Function[[], None]] = {
    "raise": _raise,
    "sleep": _sleep,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "abort": os.abort,
}


class Trouble(Callback):
    """Of one rank, at one step."""

    def __init__(self, rank: int, kind: str, step: int):
        self._rank, self._kind, self._step = rank, kind, step

    def on_step_start(self, trainer: Trainer) -> None:
        if (trainer.mesh.rank, trainer.step) == (self._rank, self._step):
            trouble, _, part = self._kind.partition(":")
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

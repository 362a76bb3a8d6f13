"""`python -m train` that keeps what it reads: logged_train.py ATTEMPT STEP FILE FOLDER OVERRIDE...

Each process writes a line to FOLDER for each micro-batch: the step, where in the global batch its rows stand, and their
tokens. After step STEP the run stands still until FILE exists.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

import train.run
from data_pipeline.reading.batch import Batch
from train.callbacks.base import Callback
from train.run import make_callbacks
from train.trainer import Trainer


class Logged(Callback):
    """Of one process of one start."""

    def __init__(self, attempt: int, last_step: int, go_on: Path, folder: Path):
        self._attempt, self._last_step, self._go_on, self._folder = attempt, last_step, go_on, folder

    def on_run_start(self, trainer: Trainer) -> None:
        mesh, train_batch = trainer.mesh, trainer.engine.train_batch
        file = (self._folder / f"{self._attempt:04d}-{mesh.rank:02d}.jsonl").open("w")

        def logging(micro_batches: Sequence[Batch], valid_tokens: Tensor) -> Tensor:
            for number, batch in enumerate(micro_batches):
                place = [mesh.data, number, mesh.sequence]
                line = {"step": trainer.step, "place": place, "tokens": batch.tokens.tolist()}
                if mesh.pipeline == 0:
                    file.write(json.dumps(line) + "\n")
            file.flush()
            return train_batch(micro_batches, valid_tokens)

        trainer.engine.train_batch = logging  # type: ignore[method-assign]

    def on_step_start(self, trainer: Trainer) -> None:
        while trainer.step >= self._last_step and not self._go_on.exists():
            time.sleep(0.01)


def main(arguments: list[str]) -> int:
    attempt, step, go_on, folder, *overrides = arguments
    logged = Logged(int(attempt), int(step), Path(go_on), Path(folder))
    train.run.make_callbacks = lambda config, more=(): make_callbacks(config, [logged])
    from train.__main__ import main as train_main

    return train_main(overrides)


if __name__ == "__main__":
    from train.__main__ import end_process

    end_process(main(sys.argv[1:]))

"""Several runs in one start of the processes, with wrong numbers on one rank.

main([JSON])    as one of WORLD_SIZE processes over gloo; JSON: [overrides, trouble] of each run. The exit code is that
                of the last run, which alone may fail.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from conf import compose
from model.accounting import parameter_shapes
from tests.train.parallel.several_runs import EqualCopies
from train.callbacks.base import Callback
from train.config import RunConfig
from train.decisions import CONTINUE, Decision
from train.parallel.mesh import join_mesh
from train.parallel.replicas import deviating_weights
from train.run import train
from train.trainer import Trainer

# The rank whose numbers are wrong.
TROUBLED = 1


def flip(tensor: Tensor, place: int = 0) -> None:
    """The highest bit behind the point of one element becomes another, which no later rounding hides; twice: none."""
    words = tensor.view(-1).view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    words[place] ^= 1 << (8 * tensor.element_size() - 10)


class Poison(Callback):
    """NaN in a gradient of one rank, in every step that reads a sample at which one of these steps would begin."""

    def __init__(self, steps: list[int]):
        self._steps = steps
        self._factor = 1.0

    def on_run_start(self, trainer: Trainer) -> None:
        if trainer.mesh.rank == TROUBLED:
            parameter = next(iter(trainer.model.parameters()))
            parameter.register_hook(lambda gradient: gradient * self._factor)

    def on_step_start(self, trainer: Trainer) -> None:
        step = trainer.state.next_sample // trainer.config.training.global_batch_size
        self._factor = math.nan if step in self._steps else 1.0


class Comparisons(Callback):
    """After one step: who is found to hold other weights, of all ranks as they are, and with a bit of one rank's copy
    of the whole weights, or of its own part of them, flipped. Goes to a file in the run's folder."""

    def __init__(self, step: int):
        self._step = step

    def on_step_end(self, trainer: Trainer) -> Decision:
        if trainer.step == self._step:
            engine = trainer.engine
            part = engine.fragments[-1]
            found: dict[str, Any] = {
                "none": self._found(trainer),
                "whole": self._found(trainer, engine.whole_weights()["embedding.weight"]),
                "part": self._found(trainer, part.compute),
                "name_of_part": part.name,
                "after": self._found(trainer),
            }
            if trainer.mesh.rank == TROUBLED:
                (trainer.run_directory / "comparisons.json").write_text(json.dumps(found), encoding="utf-8")
        return CONTINUE

    def _found(self, trainer: Trainer, *flipped: Tensor) -> list[dict[str, Any]]:
        flipped = flipped if trainer.mesh.rank == TROUBLED else ()
        for tensor in flipped:
            flip(tensor)
        found = deviating_weights(trainer.engine, list(parameter_shapes(trainer.config.model)))
        for tensor in flipped:
            flip(tensor)
        assert trainer.mesh.broadcast_object(found, group="world") == found, "all ranks find the same"
        return [asdict(deviation) for deviation in found]


class Flip(Callback):
    """From one step on, a bit of one rank's weights is another, as where its memory is faulty: flipped anew where each
    step makes the weights anew from fp32 ones."""

    def __init__(self, step: int):
        self._step = step

    def on_step_end(self, trainer: Trainer) -> Decision:
        is_made_anew = trainer.config.parallel.zero_stage > 0 and trainer.step > self._step
        if (is_made_anew or trainer.step == self._step) and trainer.mesh.rank == TROUBLED:
            # The last is in no other rank's part, where each has its own.
            flip(trainer.engine.fragments[-1].compute, -1)
        return CONTINUE


class FlipGradient(Callback):
    """The same of a gradient, after it was reduced."""

    def __init__(self, step: int):
        self._step = step

    def on_gradients_ready(self, trainer: Trainer) -> None:
        gradient = trainer.engine.fragments[0].gradient()
        if trainer.step + 1 == self._step and trainer.mesh.rank == TROUBLED and gradient is not None:
            flip(gradient)


TROUBLES = {"poison": Poison, "compare": Comparisons, "flip": Flip, "flip_gradient": FlipGradient}


def main(arguments: list[str]) -> int:
    # The runs find a process group, and leave it for the next.
    mesh = join_mesh(timedelta(seconds=300))
    code = 0
    for overrides, troubles in json.loads(arguments[0]):
        assert code == 0, "a run has failed that is not the last"
        callbacks = [TROUBLES[kind](argument) for kind, argument in troubles.items()]
        code = train(compose(RunConfig, "train", overrides), [*callbacks, EqualCopies()])
    if code == 0:
        mesh.close()
    return code


if __name__ == "__main__":
    from train.__main__ import end_process

    end_process(main(sys.argv[1:]))

"""Several runs one after the other in one start of the processes, which takes longer than a small run.

main([JSON])    as one of WORLD_SIZE processes over gloo; JSON: the overrides of each run
"""

from __future__ import annotations

import hashlib
import json
import sys
from datetime import timedelta

from conf import compose
from tests.train.parallel.gradient_norms import GradientNorms
from train.callbacks.base import Callback
from train.config import RunConfig
from train.parallel.mesh import join_mesh
from train.run import train
from train.trainer import Trainer


class EqualCopies(Callback):
    """At the end of a run, all ranks that hold a whole weight hold the same: those of a stage, and tied copies."""

    def on_run_end(self, trainer: Trainer, outcome: str) -> None:
        if outcome != "complete" or trainer.config.parallel.zero_stage == 3:
            return
        named = trainer.model.named_parameters()
        mine = {name: hashlib.sha256(weight.detach().float().numpy().tobytes()).hexdigest() for name, weight in named}
        seen: dict[str, str] = {}
        for rank, weights in enumerate(trainer.mesh.gather_objects(mine, group="world")):
            for name, digest in weights.items():
                assert seen.setdefault(name, digest) == digest, f"rank {rank} has another {name}"


def main(arguments: list[str]) -> int:
    """Train each; the exit code of the first that fails, or 0."""
    # The runs find a process group, and leave it for the next.
    mesh = join_mesh(timedelta(seconds=300))
    for overrides in json.loads(arguments[0]):
        code = train(compose(RunConfig, "train", overrides), [EqualCopies(), GradientNorms()])
        if code:
            return code
    mesh.close()
    return 0


if __name__ == "__main__":
    from train.__main__ import end_process

    end_process(main(sys.argv[1:]))

"""A sweep of runs of seconds, for tests."""

from __future__ import annotations

from pathlib import Path

from tests.runs import TINY_RUN

# Models of 40,000 to 60,000 parameters: with sizes of their own, the settings of a size are not among these.
_OF_SIZE = ("model=", "model.d_model", "model.n_blocks", "model.slstm", "model.ffn_dim", "model.mlstm.n_heads")
_OF_SWEEP = ("training.sequence_length", "training.global_batch_size", "training.micro", "optimizer.learning_rate")
BASE = [
    setting
    for setting in TINY_RUN
    if not setting.startswith((*_OF_SIZE, *_OF_SWEEP, "schedule", "model.mlstm.reference"))
]
MACHINES = ["gpus_per_node=0", "processes_per_node=1", "launch.exclusive=false", "launch.memory=500"]


def sweep_of(root: Path, corpus: Path, *settings: str) -> list[str]:
    """The settings of a sweep "tiny" of four runs: two families, one size, two budgets."""
    return [
        "sweep=demo",
        f'sweep.root="{root}"',
        "sweep.name=tiny",
        "sweep.base=[]",
        "sweep.sizes=[{d_model: 32, n_blocks: 1}]",
        "sweep.budgets=[1.0e9, 2.0e9]",
        "sweep.contexts=[32]",
        "sweep.least_steps=4",
        "sweep.batch_tokens.value=256",
        "sweep.micro_batch_tokens=256",
        *MACHINES,
        *BASE,
        f'corpus.directory="{corpus}"',
        *settings,
    ]

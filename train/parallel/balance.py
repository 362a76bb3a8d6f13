"""Which blocks go to which pipeline stage, and what each stage takes of time and memory, from the configuration alone.

Time is counted in FLOPs (model/accounting.py): forward, backward, and what activation checkpointing computes again; of
the last stage also the head. Memory is that of one rank at its peak (model/memory.py), the embedding included; of p
stages, stage i keeps the activations of p - i micro-batches, or of all if there are fewer.

The cut is that with the least time of the slowest stage, for which all others wait. Counted FLOPs are not time to the
percent: among the cuts within TOLERANCE of it, the one with the least memory of the largest stage is taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model.accounting import count_parameters, forward_flops
from model.hardware import Hardware
from model.memory import activation_bytes, training_state_bytes
from model.parts import Part, split
from train.config import RunConfig
from train.parallel.mesh import MeshShape

TOLERANCE = 0.02


@dataclass(frozen=True)
class StageCost:
    """What a part of the model takes of each of its ranks."""

    first_block: int
    blocks: int
    # FLOPs of training one token, those of recomputation included.
    flops: float
    # Bytes at the peak of a step.
    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    activation_bytes: float

    @property
    def state_bytes(self) -> float:
        """Of what lasts for the whole run."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def bytes(self) -> float:
        return self.state_bytes + self.activation_bytes


def bubble(stages: int, micro_batches: int) -> float:
    """Share of a step that a stage waits, while the pipeline fills and empties: (p - 1) / (m + p - 1)."""
    return (stages - 1) / (micro_batches + stages - 1)


def stage_costs(config: RunConfig, shape: MeshShape, hardware: Hardware) -> list[StageCost]:
    """The stages of a valid `config`, first to last; without a pipeline one that holds the whole model."""
    accounts = _Accounts(config, shape, hardware)
    return [accounts.cost(part, number) for number, part in enumerate(_balanced_parts(accounts))]


def parts_of(config: RunConfig, stages: Sequence[StageCost]) -> list[Part]:
    """What of the model each stage holds."""
    return split(config.model, [stage.first_block for stage in stages[1:]])


class _Accounts:
    """Time and memory of parts of the model, laid out over a mesh."""

    def __init__(self, config: RunConfig, shape: MeshShape, hardware: Hardware):
        self.config, self.shape, self.hardware = config, shape, hardware
        self.stages = shape.pipeline
        training = config.training
        self._micro_batches = training.global_batch_size // (training.micro_batch_size * shape.data)

    def in_flight(self, stage: int) -> int:
        """Micro-batches that a stage has begun and not ended, at most."""
        return max(1, min(self.stages - stage, self._micro_batches))

    def cost(self, part: Part, stage: int) -> StageCost:
        """What `part` takes as stage number `stage`."""
        config, model = self.config, self.config.model
        precision, zero_stage = config.precision, config.parallel.zero_stage
        ranks = self.shape.data * self.shape.sequence
        weight_bytes = precision.weight_dtype(zero_stage).itemsize
        memory = training_state_bytes(model, zero_stage, ranks, weight_bytes, part=part)
        # The optimizer has tied weights on the first stage only; ZeRO-0 has no second copy of the weights for it.
        counted = count_parameters(model, part).total
        copied = model.vocab_size * model.d_model if model.tie_embeddings and part.head and not part.embedding else 0
        optimizer = 8.0 * counted if zero_stage == 0 else memory.optimizer
        return StageCost(
            first_block=part.blocks.start,
            blocks=len(part.blocks),
            flops=self._flops(part),
            weight_bytes=memory.weights,
            gradient_bytes=memory.gradients,
            optimizer_bytes=optimizer * (1 - copied / counted) if counted else 0.0,
            activation_bytes=self._activation_bytes(part, self.in_flight(stage)),
        )

    def _flops(self, part: Part) -> float:
        length = self.config.training.sequence_length
        forward = sum(forward_flops(self.config.model, length, self.hardware, part).values())
        again = 0.0
        if self.config.parallel.activation_checkpointing != "none":
            again = sum(forward_flops(self.config.model, length, self.hardware, Part(part.blocks)).values())
        return (3.0 * forward + again) / length

    def _activation_bytes(self, part: Part, in_flight: int) -> float:
        training, sequence_ranks = self.config.training, self.shape.sequence
        found = activation_bytes(
            self.config.model,
            training.micro_batch_size,
            training.sequence_length,
            self.config.parallel.activation_checkpointing,
            self.hardware,
            part,
            sequence_ranks,
            in_flight,
        )
        # DeepSpeed keeps the hidden states that a stage sent, and copies those that it received.
        passed = (not part.embedding) + (not part.head)
        tokens = training.micro_batch_size * training.sequence_length // sequence_ranks
        return found + in_flight * passed * tokens * self.config.model.d_model * self.hardware.compute_bytes

    def kept_bytes(self, block: Part) -> float:
        """What a micro-batch in flight keeps of a block."""
        return self._activation_bytes(block, 2) - self._activation_bytes(block, 1)


# (stage, first block, block behind the last) -> what it costs.
_Cost = Callable[[int, int, int], float]


def _balanced_parts(accounts: _Accounts) -> list[Part]:
    model, stages = accounts.config.model, accounts.stages
    if stages == 1:
        return [Part.whole(model)]
    kinds = model.block_kinds()
    # Blocks of one kind are alike.
    blocks = {kind: Part(range(kinds.index(kind), kinds.index(kind) + 1)) for kind in kinds}
    costs = {kind: accounts.cost(part, stages - 1) for kind, part in blocks.items()}
    kept = {kind: accounts.kept_bytes(part) for kind, part in blocks.items()}
    flops, state, kept_until = (
        list(itertools.accumulate((of_kind(kind) for kind in kinds), initial=0.0))
        for of_kind in (lambda kind: costs[kind].flops, lambda kind: costs[kind].state_bytes, lambda kind: kept[kind])
    )
    first_end = accounts.cost(Part(range(0), embedding=True), 0)
    last_end = accounts.cost(Part(range(0), head=True), stages - 1)
    ends = {0: first_end, stages - 1: last_end}

    def time(stage: int, first: int, end: int) -> float:
        return flops[end] - flops[first] + (ends[stage].flops if stage in ends else 0.0)

    limit = (1 + TOLERANCE) * _least_maximum(model.n_blocks, stages, time)[0]

    def memory(stage: int, first: int, end: int) -> float:
        if time(stage, first, end) > limit:
            return math.inf
        of_blocks = state[end] - state[first] + accounts.in_flight(stage) * (kept_until[end] - kept_until[first])
        return of_blocks + (ends[stage].bytes if stage in ends else 0.0)

    return split(model, _least_maximum(model.n_blocks, stages, memory)[1])


def _least_maximum(n_blocks: int, stages: int, cost: _Cost) -> tuple[float, list[int]]:
    """The cut into stages of at least one block whose largest cost is least: (that cost, first blocks of all but the
    first stage)."""
    # By the number of blocks that the stages so far hold.
    best: dict[int, tuple[float, list[int]]] = {end: (cost(0, 0, end), []) for end in range(1, n_blocks + 1)}
    for stage in range(1, stages):
        best = {
            end: min(
                (max(best[first][0], cost(stage, first, end)), [*best[first][1], first]) for first in range(stage, end)
            )
            for end in range(stage + 1, n_blocks + 1)
        }
    return best[n_blocks]

"""Which blocks go to which pipeline stage, and what each stage takes of time and memory, from the configuration alone.

Time is counted in FLOPs (model/accounting.py): forward, backward, and what activation checkpointing computes again; of
the last stage also the head. Memory is that of one rank at its peak (model/memory.py), the embedding included; of p
stages, stage i keeps the activations of p - i micro-batches, or of all if there are fewer. Of micro-batches that go in
k time chunks it keeps k + p - 1 - i chunks, each with the state that enters it.

The cut is that with the least time of the slowest stage, for which all others wait. Counted FLOPs are not time to the
percent: among the cuts within TOLERANCE of it, the one with the least memory of the largest stage is taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model.accounting import count_parameters, forward_flops
from model.compilation import CAPTURED
from model.hardware import CPU, Hardware
from model.memory import Activations, InWork, TrainingStateBytes, activations, training_state_bytes
from model.parts import Part, split
from train.config import RunConfig
from train.parallel.mesh import MeshShape
from train.parallel.step_memory import Held, StepMemory, step_memory
from train.parallel.time_chunks import TimeChunks

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
    # Of these, the memory that enters each chunk of the recurrences, and the chunk of logits in work.
    chunk_state_bytes: float
    logit_bytes: float
    # What DeepSpeed collects gradients in before it reduces them, and weights that ZeRO-3 has gathered.
    communication_bytes: float
    # Gradients and their copies at the end of a step, in the place of gradients, activations and the like
    # (train/parallel/step_memory.py).
    update_bytes: float

    @property
    def state_bytes(self) -> float:
        """Of what is there in every pass."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def bytes(self) -> float:
        """At the peak: of a pass, or at the end of a step."""
        in_passes = self.gradient_bytes + self.activation_bytes + self.communication_bytes
        return self.weight_bytes + self.optimizer_bytes + max(in_passes, self.update_bytes)


def bubble(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """Share of a step that a stage waits, while the pipeline fills and empties: (p - 1) / (m k + p - 1).

    `chunks`: k time chunks of each micro-batch.
    """
    if stages == 1:
        return 0.0
    return (stages - 1) / (micro_batches * chunks + stages - 1)


def units_in_flight(stages: int, stage: int, micro_batches: int, chunks: int = 1) -> int:
    """Time chunks of micro-batches that stage i has begun and not ended, at most: k + p - 1 - i, or all there are."""
    return min(chunks + stages - 1 - stage, micro_batches * chunks)


def slowest_against_mean(stages: Sequence[StageCost]) -> float:
    """How much longer than the mean stage the slowest one takes, for which all others wait; at least 1."""
    flops = [stage.flops for stage in stages]
    return max(flops) * len(flops) / sum(flops)


def stage_costs(config: RunConfig, shape: MeshShape, hardware: Hardware) -> list[StageCost]:
    """The stages of a valid `config`, first to last; without a pipeline one that holds the whole model."""
    accounts = Accounts(config, shape, hardware)
    return [accounts.cost(part, number) for number, part in enumerate(_balanced_parts(accounts))]


def parts_of(config: RunConfig, stages: Sequence[StageCost]) -> list[Part]:
    """What of the model each stage holds."""
    return split(config.model, [stage.first_block for stage in stages[1:]])


class Accounts:
    """Time and memory of parts of the model, laid out over a mesh."""

    def __init__(self, config: RunConfig, shape: MeshShape, hardware: Hardware):
        self.config, self.shape, self.hardware = config, shape, hardware
        self.stages = shape.pipeline
        training = config.training
        self._micro_batches = training.global_batch_size // (training.micro_batch_size * shape.data)
        self._chunks = TimeChunks(training.time_chunk).count(training.sequence_length)

    def in_flight(self, stage: int) -> int:
        """Time chunks of micro-batches that a stage has begun and not ended, at most; without stages there is one."""
        if self.stages == 1:
            return 1
        return max(1, units_in_flight(self.stages, stage, self._micro_batches, self._chunks))

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
        kept = self.activations(part, self.in_flight(stage))
        of_step = self._step_memory(part, memory)
        cast = float(precision.compute_dtype.itemsize * counted) if precision.uses_autocast(zero_stage) else 0.0
        return StageCost(
            first_block=part.blocks.start,
            blocks=len(part.blocks),
            flops=self._flops(part),
            weight_bytes=memory.weights,
            gradient_bytes=of_step.gradients,
            optimizer_bytes=optimizer * (1 - copied / counted) if counted else 0.0,
            activation_bytes=kept.total + self._passed_bytes(part, stage) + cast,
            chunk_state_bytes=kept.chunk_states,
            logit_bytes=kept.logits,
            communication_bytes=of_step.buffers,
            update_bytes=of_step.at_the_end,
        )

    def _step_memory(self, part: Part, memory: TrainingStateBytes) -> StepMemory:
        """On a CPU gradients alone: its memory is taken when something is written to it."""
        if self.hardware.device_name == CPU:
            return StepMemory(memory.gradients, 0.0, memory.gradients)
        model = self.config.model
        embedding = model.vocab_size * model.d_model if part.embedding else 0
        return step_memory(
            self.config,
            Held(count_parameters(model, part).total, embedding),
            self.shape.data * self.shape.sequence,
            self._micro_batches * self._chunks,
            self.config.execution("cuda") == CAPTURED,
        )

    def _flops(self, part: Part) -> float:
        length = self.config.training.sequence_length
        forward = sum(forward_flops(self.config.model, length, self.hardware, part).values())
        again = 0.0
        if self.config.parallel.activation_checkpointing != "none":
            again = sum(forward_flops(self.config.model, length, self.hardware, Part(part.blocks)).values())
        return (3.0 * forward + again) / length

    def activations(self, part: Part, in_flight: int) -> Activations:
        """What its layers keep of so many time chunks of micro-batches, with what the one in work takes."""
        training = self.config.training
        return activations(
            self.config.model,
            training.micro_batch_size,
            training.sequence_length,
            self.config.parallel.activation_checkpointing,
            self.hardware,
            part,
            InWork(self.shape.sequence, training.time_chunk, in_flight),
        )

    def _passed_bytes(self, part: Part, stage: int) -> float:
        """Of the hidden states that a stage received, copied by DeepSpeed, and of those that it sent, kept by it."""
        training = self.config.training
        length = min(training.sequence_length, training.time_chunk or training.sequence_length)
        tokens = training.micro_batch_size * length // self.shape.sequence
        ways = (not part.embedding) + (not part.head)
        return float(ways * self.in_flight(stage) * tokens * self.config.model.d_model * self.hardware.compute_bytes)


# (stage, first block, block behind the last) -> what it costs.
_Cost = Callable[[int, int, int], float]


def _balanced_parts(accounts: Accounts) -> list[Part]:
    model, stages = accounts.config.model, accounts.stages
    if stages == 1:
        return [Part.whole(model)]
    kinds = model.block_kinds()
    # Blocks of one kind are alike.
    blocks = {kind: Part(range(kinds.index(kind), kinds.index(kind) + 1)) for kind in kinds}
    costs = {kind: accounts.cost(part, stages - 1) for kind, part in blocks.items()}
    ends = [
        accounts.cost(Part(range(0), embedding=number == 0, head=number == stages - 1), number)
        for number in range(stages)
    ]
    flops = _running_sums([costs[kind].flops for kind in kinds])
    state = _running_sums([costs[kind].state_bytes for kind in kinds])

    def time(stage: int, first: int, end: int) -> float:
        return flops[end] - flops[first] + ends[stage].flops

    limit = (1 + TOLERANCE) * _least_maximum(model.n_blocks, stages, time)[0]
    once = {kind: accounts.activations(part, 1).total for kind, part in blocks.items()}
    kept = {kind: accounts.activations(part, 2).total - once[kind] for kind, part in blocks.items()}
    kept_until = _running_sums([kept[kind] for kind in kinds])
    number_until = {kind: _running_sums([float(other == kind) for other in kinds]) for kind in blocks}

    def memory(stage: int, first: int, end: int) -> float:
        if time(stage, first, end) > limit:
            return math.inf
        present = [kind for kind, until in number_until.items() if until[end] > until[first]]
        in_work = max(once[kind] - kept[kind] for kind in present)
        in_flight = accounts.in_flight(stage) * (kept_until[end] - kept_until[first])
        return state[end] - state[first] + in_flight + in_work + ends[stage].bytes

    return split(model, _least_maximum(model.n_blocks, stages, memory)[1])


def _running_sums(values: Sequence[float]) -> list[float]:
    """Of the first 0, 1, 2, ... values."""
    return list(itertools.accumulate(values, initial=0.0))


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

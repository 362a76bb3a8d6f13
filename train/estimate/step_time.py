"""How long a step takes, from what a calibration says of single operations: a sum that a reader can follow.

    step = (micro-batches x chunks + stages - 1) x unit + communication + update + what the trainer does between steps
    unit = about the longer of what the GPU and what its host takes for a pass of the slowest stage over a time chunk

The unit's GPU time is that of products, cells and moved bytes (train/estimate/coefficients.py); what activation
checkpointing computes again adds a forward pass of the blocks, and so do time chunks without stages.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.accounting import count_parameters
from model.hardware import Hardware
from model.layers import layer_kinds
from model.parts import Part
from train.config import RunConfig
from train.estimate.blocks import (
    GRADIENT_BYTES,
    REDUCED_BYTES,
    block_works,
    has_aligned_head,
    head_products,
    logits_moved,
)
from train.estimate.machine import Machine
from train.parallel.mesh import MeshShape
from train.parallel.time_chunks import TimeChunks

# A GPU and its host that take about as long wait for each other now and then: the time of a pass is the norm of both
# with this exponent. On H200, 131 ms of a GPU and 130 of its host were 147 together.
_OVERLAP = 6
# Of a pass that computes blocks again, the host launches a third more.
_HOST_AGAIN = 4 / 3
# Seconds of a step that the engine does not see: the next samples, what ranks agree on, figures.
BETWEEN_STEPS = 3e-3
# What each block of each pass waits for other sequence ranks, and how much of its cell it computes beside: of 24 blocks
# on two H200, 34 ms and 10 of 27 (benchmarks/results/2026-11-28-sequence-parallel.md).
_SEQUENCE_WAIT = 34e-3 / 24
_SEQUENCE_CELL = 10 / 27
# What each block of each pass waits for its weights with ZeRO-3: of 24 blocks on two H200, 124 ms
# (benchmarks/results/2026-11-29-layouts.md).
_ZERO3_WAIT = 124e-3 / 24


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step, by what takes them; they add up to `total`."""

    # Forward and backward of all micro-batches, once.
    passes: float
    # What is computed a second time.
    recomputation: float
    # The GPU waits for its host.
    host: float
    # Stages wait for the first and the last micro-batches, and for the slowest stage.
    pipeline: float
    communication: float
    # Gradient norm, clipping, optimizer, and what is between steps.
    update: float

    @property
    def total(self) -> float:
        return sum((self.passes, self.recomputation, self.host, self.pipeline, self.communication, self.update))


@dataclass(frozen=True)
class _Unit:
    """Seconds of one pass of a stage."""

    once: float
    again: float
    host: float
    exchange: float

    @property
    def total(self) -> float:
        on_gpu = self.once + self.again
        longer = max(on_gpu, self.host)
        both = ((on_gpu / longer) ** _OVERLAP + (self.host / longer) ** _OVERLAP) ** (1 / _OVERLAP)
        return longer * both + self.exchange


def step_seconds(config: RunConfig, shape: MeshShape, machine: Machine, parts: list[Part]) -> StepSeconds:
    """Of a step of a valid `config`, whose stages hold `parts`."""
    return _Step(config, shape, machine).seconds(parts)


class _Step:
    def __init__(self, config: RunConfig, shape: MeshShape, machine: Machine):
        self._config, self._shape, self._machine = config, shape, machine
        training = config.training
        self._hardware = Hardware(machine.device, config.precision.compute_dtype.itemsize)
        self._execution = config.execution("cuda")
        self._chunks = TimeChunks(training.time_chunk).count(training.sequence_length)
        self._length = min(training.sequence_length, training.time_chunk or training.sequence_length)
        self._micro_batches = training.global_batch_size // (training.micro_batch_size * shape.data)
        works = (config.model, training.micro_batch_size, self._length, self._hardware, machine.rates, shape.sequence)
        self._works = block_works(*works)
        self._kinds = [kind.name for kind in layer_kinds(config.model)]

    def seconds(self, parts: list[Part]) -> StepSeconds:
        units = [self._unit(part) for part in parts]
        slowest = max(units, key=lambda unit: unit.total)
        count = self._micro_batches * self._chunks
        mean = sum(unit.total for unit in units) / len(units)
        waited = (count + len(parts) - 1) * slowest.total - count * mean
        computed = sum(unit.once for unit in units) / len(units)
        again = sum(unit.again for unit in units) / len(units)
        exchange = sum(unit.exchange for unit in units) / len(units)
        largest = max(count_parameters(self._config.model, part).total for part in parts)
        return StepSeconds(
            passes=count * computed,
            recomputation=count * again,
            host=count * (mean - computed - again - exchange),
            pipeline=waited,
            communication=count * exchange + self._communication(largest, count * (computed + again)),
            update=max(self._update(part) for part in parts),
        )

    def _unit(self, part: Part) -> _Unit:
        machine, config, shape = self._machine, self._config, self._shape
        fitted, rates, training = machine.coefficients, machine.rates, config.training
        tokens = training.micro_batch_size * self._length // shape.sequence
        forward = once = waits = 0.0
        for index in part.blocks:
            kind = self._kinds[index]
            work = self._works[kind]
            elementwise = fitted.elementwise_of(self._execution, kind) * work.moved
            forward += work.products + work.cell_forward + fitted.forward_share * elementwise
            once += 3 * work.products + work.cell_both + elementwise
            if shape.sequence > 1:
                once += _SEQUENCE_CELL * work.cell_both
                waits += _SEQUENCE_WAIT
        if part.head:
            longer = 1.0 if has_aligned_head(config.model) else fitted.unaligned_head
            once += longer * head_products(config.model, tokens, rates)
            once += fitted.logits * logits_moved(config.model, tokens, rates)
        once += rates.moving(GRADIENT_BYTES * count_parameters(config.model, part).total)
        recomputes = config.parallel.activation_checkpointing != "none"
        # All chunks but the last run without gradients first; stages keep what they computed.
        twice = (self._chunks - 1) / self._chunks if shape.pipeline == 1 else 0.0
        launched = fitted.host[self._execution]
        host = len(part.blocks) * launched.block * (_HOST_AGAIN if recomputes else 1.0) + launched.rest
        if shape.pipeline > 1:
            passed = tokens * config.model.d_model * self._hardware.compute_bytes
            waits += 2 * machine.links.send(passed, shape.data * shape.sequence)
        return _Unit(once, forward * (recomputes + twice), host * (1 + twice / 3), waits)

    def _communication(self, parameters: int, computed: float) -> float:
        """Of one step, whose passes compute so long."""
        ranks, links = self._shape.data * self._shape.sequence, self._machine.links
        stage, count = self._config.parallel.zero_stage, self._micro_batches * self._chunks
        width = self._config.precision.weight_dtype(stage).itemsize
        if stage == 0:
            return links.reduce(4.0 * parameters, ranks)
        if stage == 1:
            # In bf16, DeepSpeed reduces gradients in bf16, though it adds them up in fp32.
            return links.reduce(width * parameters, ranks) + links.gather(width * parameters, ranks)
        scattered = links.gather(width * parameters, ranks)
        if stage == 2:
            return (count + 1) * scattered
        # Weights are gathered forward and backward, while other blocks are computed.
        moved = count * 3 * scattered
        return count * self._config.model.n_blocks * _ZERO3_WAIT * (ranks > 1) + max(0.0, moved - computed)

    def _update(self, part: Part) -> float:
        counted = count_parameters(self._config.model, part)
        fitted, stage = self._machine.coefficients.update, self._config.parallel.zero_stage
        held = counted.total / (self._shape.data * self._shape.sequence if stage else 1)
        moved = fitted.bytes * held
        if stage == 1 and self._config.precision.is_bf16:
            moved += REDUCED_BYTES * counted.total
        return fitted.once + fitted.tensor * counted.tensors + self._machine.rates.moving(moved) + BETWEEN_STEPS

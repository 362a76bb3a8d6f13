"""Every way to lay a run out over its GPUs that works, with what each takes, the fastest that fit first."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from model.recomputation import ACTIVATION_CHECKPOINTING
from train.config import ParallelConfig, RunConfig
from train.estimate.machine import Machine
from train.memory_check import GPU_FACTOR
from train.plan import Plan, make_plan
from train.validate import validate

# Of a GPU's memory, what its driver and libraries take before a run begins.
_TAKEN_BYTES = 1.5 * 2**30
# Tokens of a pass of one rank beyond which a larger one gains nothing.
_MOST_TOKENS = 131_072
# Stages beyond which none are looked for: each further one waits longer.
_STAGES = 16
_AS_LONG = math.log(1.005)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Layout:
    """One way, with its plan."""

    zero_stage: int
    activation_checkpointing: str
    micro_batch_size: int
    sequence: int
    pipeline: int
    plan: Plan
    room: float

    @property
    def needed_bytes(self) -> float:
        return self.plan.rank_bytes + self.plan.graph_bytes

    @property
    def fits(self) -> str:
        """yes, tight (at the most that a plan has been found short by, it would not) or no."""
        if self.needed_bytes * GPU_FACTOR <= self.room:
            return "yes"
        return "tight" if self.needed_bytes <= self.room else "no"

    @property
    def seconds(self) -> float:
        assert self.plan.step_seconds is not None, "layouts are of calibrated machines"
        return self.plan.step_seconds.total

    @property
    def overrides(self) -> list[str]:
        """What gives a run this layout."""
        return [
            f"parallel.zero_stage={self.zero_stage}",
            f"parallel.activation_checkpointing={self.activation_checkpointing}",
            f"training.micro_batch_size={self.micro_batch_size}",
            f"parallel.sequence={self.sequence}",
            f"parallel.pipeline={self.pipeline}",
        ]

    def as_dict(self) -> dict[str, Any]:
        return {
            "overrides": self.overrides,
            "fits": self.fits,
            "rank_bytes": self.needed_bytes,
            "step_seconds": self.seconds,
            "tokens_per_second_per_gpu": self.plan.tokens_per_second_per_device,
        }


def room_of(machine: Machine) -> float:
    """Bytes of a GPU that a run may use."""
    return machine.calibration.memory_bytes - _TAKEN_BYTES


def layout_of(config: RunConfig, machine: Machine) -> Layout:
    """The layout that a valid `config` has."""
    parallel = config.parallel
    return Layout(
        parallel.zero_stage,
        parallel.activation_checkpointing,
        config.training.micro_batch_size,
        parallel.sequence,
        parallel.pipeline,
        make_plan(config, machine.ranks, machine=machine),
        room_of(machine),
    )


def all_layouts(config: RunConfig, machine: Machine) -> list[Layout]:
    """Those with the batch, the precision and everything else of `config`, fastest first, those that fit before others.

    Not among them is what another one is better than in everything that counts: larger micro-batches where smaller ones
    do not fit, and more recomputation where less of it fits. Of layouts that take as long, to half a percent, the one
    with the lower ZeRO stage comes first, then the one that needs less memory.
    """
    found = [layout for divided in _divided(config, machine) for layout in _of_sizes(divided, machine)]
    return sorted(found, key=_place)


def _place(layout: Layout) -> tuple[float, ...]:
    as_long = round(math.log(layout.seconds) / _AS_LONG)
    return (("yes", "tight", "no").index(layout.fits), as_long, layout.zero_stage, layout.needed_bytes)


def _divided(config: RunConfig, machine: Machine) -> Iterator[RunConfig]:
    """Every division of the ranks into stages, replicas and slices, with each ZeRO stage that goes with it."""
    of_node = machine.ranks // machine.nodes
    for pipeline, sequence in itertools.product(_SIZES, _SIZES):
        if sequence > max(of_node, config.parallel.sequence) or pipeline > max(_STAGES, config.parallel.pipeline):
            continue
        if machine.ranks % (pipeline * sequence) or pipeline > config.model.n_blocks:
            continue
        for zero_stage in (1, 2, 3) if pipeline == 1 else (1,):
            parallel = dataclasses.replace(config.parallel, zero_stage=zero_stage, pipeline=pipeline, sequence=sequence)
            divided = _with(config, parallel, 1)
            if not validate(divided, machine.ranks):
                yield divided


def _of_sizes(config: RunConfig, machine: Machine) -> Iterator[Layout]:
    """With every micro-batch that fits, or the smallest one, and the least recomputation with which it does."""
    training, parallel = config.training, config.parallel
    per_replica = training.global_batch_size * parallel.pipeline * parallel.sequence // machine.ranks
    length = min(training.sequence_length, training.time_chunk or training.sequence_length) // parallel.sequence
    for size in _SIZES:
        if per_replica % size or (size > 1 and size * length > _MOST_TOKENS):
            continue
        for mode in ACTIVATION_CHECKPOINTING:
            layout = layout_of(
                _with(config, dataclasses.replace(parallel, activation_checkpointing=mode), size), machine
            )
            if layout.fits != "no" or size == 1:
                yield layout
            if layout.fits == "yes":
                break
        if layout.fits == "no":
            return


def _with(config: RunConfig, parallel: ParallelConfig, micro_batch_size: int) -> RunConfig:
    training = dataclasses.replace(config.training, micro_batch_size=micro_batch_size)
    return dataclasses.replace(config, training=training, parallel=parallel)

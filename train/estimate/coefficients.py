"""The few numbers that a calibration's steps say and its single operations do not: least-squares fits.

A pass over n blocks takes n b + a, where b is a block's time and a the rest's. Two depths give both:

    b   products + cell + elementwise x (bytes that the block keeps / copy rate) + what the sums of gradients move
    a   the head's products + logits x (bytes of the logits / copy rate) + what the sums of gradients move

So `elementwise` holds whatever else a block does, products that are slower among others than alone among it. A forward
pass of a block has a third of its products, its cell's forward part, and `forward_share` of what is elementwise.
Products of a head whose vocabulary is no multiple of 8 take `unaligned_head` times as long.

Where a GPU would wait for its host, steps of few tokens show the host's time of a block and of the rest of a pass. An
update takes a time of its own, one for each tensor, and one for each byte that it moves.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from model.accounting import count_parameters
from model.compilation import CAPTURED, COMPILED, WRITTEN
from model.config import ModelConfig
from model.hardware import Hardware
from model.layers import layer_kinds
from model.memory import LOSS_CHUNK_TOKENS
from train.estimate.blocks import (
    GRADIENT_BYTES,
    REDUCED_BYTES,
    BlockWork,
    block_works,
    has_aligned_head,
    head_products,
    logits_moved,
)
from train.estimate.calibration import CALIBRATION_MICRO_BATCHES, Calibration, StepPoint
from train.estimate.models import model_of_steps
from train.estimate.rates import Rates

# Steps of so few tokens show the host's time.
_FEW_TOKENS = 1024


@dataclass(frozen=True)
class HostSeconds:
    """What the host takes to launch a pass: of each block, and once."""

    block: float
    rest: float


@dataclass(frozen=True)
class UpdateSeconds:
    """What a gradient norm, clipping and an optimizer step take: once, for each tensor, and the bytes they move for
    each parameter that a rank holds the optimizer of."""

    once: float
    tensor: float
    bytes: float


@dataclass(frozen=True)
class Coefficients:
    """See the module's docstring."""

    # By the way that blocks run (model.compilation), then by the kind of layer; "" for a kind that was not measured.
    elementwise: dict[str, dict[str, float]]
    forward_share: float
    logits: float
    unaligned_head: float
    update: UpdateSeconds
    # By the way that blocks run.
    host: dict[str, HostSeconds]
    # What was not measured, and taken as below.
    assumed: list[str] = field(default_factory=list)

    def elementwise_of(self, execution: str, kind: str) -> float:
        """Of blocks of a kind that run so. One that was not measured has the mean of the others, or what it has
        compiled, and so much more as others have."""
        of_kinds, compiled = self.elementwise[execution], self.elementwise[COMPILED]
        if kind in of_kinds:
            return of_kinds[kind]
        return compiled.get(kind, compiled[""]) * of_kinds[""] / compiled[""]


# As an H200 has them, with torch 2.11 and Triton 3.6: of a calibration without steps of an engine.
TYPICAL = Coefficients(
    elementwise={WRITTEN: {"": 6.8}, COMPILED: {"": 5.2}, CAPTURED: {"": 5.3}},
    forward_share=0.4,
    logits=5.4,
    unaligned_head=5.3,
    update=UpdateSeconds(2e-4, 5e-5, 70.0),
    host={
        WRITTEN: HostSeconds(6.6e-3, 5e-4),
        COMPILED: HostSeconds(5.4e-3, 5e-4),
        CAPTURED: HostSeconds(1.4e-3, 3.3e-3),
    },
)


def fit(calibration: Calibration) -> Coefficients:
    """The coefficients of a calibration. What its steps do not show is that of TYPICAL, and named in `assumed`."""
    return _Fit(calibration).coefficients()


@dataclass(frozen=True)
class _Point:
    """A step, with the block's and the rest's part of its pass."""

    step: StepPoint
    config: ModelConfig
    block: float
    rest: float

    @property
    def tokens(self) -> int:
        return self.step.micro_batch_size * self.step.sequence_length

    @property
    def kind(self) -> str:
        """Of its blocks, which are all alike."""
        return layer_kinds(self.config)[0].name


class _Fit:
    def __init__(self, calibration: Calibration):
        self._hardware = Hardware(calibration.device)
        self._rates = Rates(calibration)
        self._steps = calibration.steps
        self._points = list(_points(calibration.steps))
        self.assumed: list[str] = []

    def coefficients(self) -> Coefficients:
        host = {execution: self._host(execution) for execution in TYPICAL.host}
        # Of points that show the GPU's time: all is computed once, and the host is ahead.
        busy = [
            point
            for point in self._points
            if point.tokens > _FEW_TOKENS and point.block > 1.1 * host[point.step.execution].block
        ]
        once = [point for point in busy if point.step.activation_checkpointing == "none"]
        logits = self._logits(once)
        return Coefficients(
            elementwise={execution: self._elementwise(execution, once) for execution in TYPICAL.elementwise},
            forward_share=self._forward_share(busy),
            logits=logits,
            unaligned_head=self._unaligned_head(once, logits),
            update=self._update(),
            host=host,
            assumed=self.assumed,
        )

    def _host(self, execution: str) -> HostSeconds:
        for point in self._points:
            if point.tokens <= _FEW_TOKENS and point.step.execution == execution:
                return HostSeconds(max(point.block, 0.0), max(point.rest, 0.0))
        self.assumed.append(f"the host's time of {execution} blocks")
        return TYPICAL.host[execution]

    def _elementwise(self, execution: str, points: Sequence[_Point]) -> dict[str, float]:
        of_kinds: dict[str, list[float]] = {}
        for point in points:
            if point.step.execution == execution:
                work = self._work(point)
                of_kinds.setdefault(point.kind, []).append(self._rest_of_block(point) / work.moved)
        if not of_kinds:
            self.assumed.append(f"the bytes that {execution} blocks move")
            return TYPICAL.elementwise[execution]
        means = {kind: max(0.0, sum(values) / len(values)) for kind, values in of_kinds.items()}
        # Ratios of ways to run are those of a kind that was measured in all.
        return {**means, "": means.get("mlstm", sum(means.values()) / len(means))}

    def _rest_of_block(self, point: _Point) -> float:
        work = self._work(point)
        return point.block - 3 * work.products - work.cell_both - self._gradients(work.parameters)

    def _forward_share(self, points: Sequence[_Point]) -> float:
        shares = []
        for point in points:
            step = point.step
            if step.activation_checkpointing == "none":
                continue
            for other in points:
                keeps_all = other.step.activation_checkpointing == "none" and other.step.execution == step.execution
                if keeps_all and _is_alike(other.step, step):
                    work = self._work(point)
                    again = point.block - other.block - work.products - work.cell_forward
                    shares.append(again / max(self._rest_of_block(other), 1e-9))
        if not shares:
            self.assumed.append("the forward pass's share of the bytes that blocks move")
            return TYPICAL.forward_share
        return min(1.0, max(0.0, statistics.median(shares)))

    def _logits(self, points: Sequence[_Point]) -> float:
        found = [
            (self._rest_of_pass(point) - head_products(point.config, point.tokens, self._rates))
            / self._logits_of(point)
            for point in points
            if point.tokens >= LOSS_CHUNK_TOKENS and has_aligned_head(point.config)
        ]
        if not found:
            self.assumed.append("the bytes that the head moves")
            return TYPICAL.logits
        return max(0.0, statistics.median(found))

    def _unaligned_head(self, points: Sequence[_Point], logits: float) -> float:
        found = [
            (self._rest_of_pass(point) - logits * self._logits_of(point))
            / head_products(point.config, point.tokens, self._rates)
            for point in points
            if point.tokens >= LOSS_CHUNK_TOKENS and not has_aligned_head(point.config)
        ]
        if not found:
            self.assumed.append("the head of a vocabulary that is no multiple of 8")
            return TYPICAL.unaligned_head
        return max(1.0, statistics.median(found))

    def _rest_of_pass(self, point: _Point) -> float:
        return point.rest - self._gradients(2 * point.config.vocab_size * point.config.d_model)

    def _logits_of(self, point: _Point) -> float:
        return logits_moved(point.config, point.tokens, self._rates)

    def _update(self) -> UpdateSeconds:
        counts = [count_parameters(_model(step)) for step in self._steps]
        rows = np.array([[1.0, count.tensors, count.total * self._rates.moving(1.0)] for count in counts])
        if len(counts) < 3 or np.linalg.matrix_rank(rows) < 3:
            self.assumed.append("the time of an update")
            return TYPICAL.update
        times = np.array([step.update_seconds for step in self._steps])
        fitted, *_ = np.linalg.lstsq(rows / times[:, None], np.ones(len(times)), rcond=None)
        return UpdateSeconds(*(max(0.0, float(value)) for value in fitted))

    def _work(self, point: _Point) -> BlockWork:
        batch = (point.step.micro_batch_size, point.step.sequence_length)
        return block_works(point.config, *batch, self._hardware, self._rates)[point.kind]

    def _gradients(self, parameters: float) -> float:
        """Of a calibration's pass, which has its share of what is copied once a step."""
        return self._rates.moving((GRADIENT_BYTES + REDUCED_BYTES / CALIBRATION_MICRO_BATCHES) * parameters)


def _points(steps: Sequence[StepPoint]) -> Iterator[_Point]:
    """Every step whose model was measured with another depth too; and those that differ from such a one in how the
    blocks run, or in what is computed again: the rest of their pass is the same."""
    slopes: dict[tuple[object, ...], tuple[float, float]] = {}
    for deep in steps:
        for flat in steps:
            if flat.n_blocks < deep.n_blocks and _key(flat)[1:] == _key(deep)[1:]:
                block = (deep.pass_seconds - flat.pass_seconds) / (deep.n_blocks - flat.n_blocks)
                slopes[_key(deep)] = (block, deep.pass_seconds - deep.n_blocks * block)
    for step in steps:
        if _key(step) in slopes:
            yield _Point(step, _model(step), *slopes[_key(step)])
            continue
        alike = next((slopes[_key(other)] for other in steps if _key(other) in slopes and _is_alike(other, step)), None)
        if alike is not None:
            yield _Point(step, _model(step), (step.pass_seconds - alike[1]) / step.n_blocks, alike[1])


def _key(step: StepPoint) -> tuple[object, ...]:
    batch = (step.micro_batch_size, step.sequence_length)
    return (step.n_blocks, (step.model, step.block), batch, step.execution, step.activation_checkpointing)


def _is_alike(one: StepPoint, other: StepPoint) -> bool:
    return _key(one)[:3] == _key(other)[:3]


def _model(step: StepPoint) -> ModelConfig:
    return model_of_steps(step.model, step.n_blocks, step.block)

"""The few numbers that a calibration's steps say and its single operations do not: a least-squares fit to each.

A pass over n blocks takes n b + a, where b is a block's time and a the rest's. Two depths give both:

    b   products + cell + what the sums of gradients move + elementwise x (bytes that the block keeps / copy rate)
    a   the head's products + logits x (bytes of the logits / copy rate)
    forward pass of a block: its products and cell, and `forward_share` of what is elementwise

Where a GPU would wait for its host, steps of few tokens show the host's time of a block and of the rest of a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from model.accounting import count_parameters
from model.compilation import CAPTURED, COMPILED, WRITTEN
from model.config import ModelConfig
from model.hardware import Hardware
from model.layers import layer_kinds
from model.memory import LOSS_CHUNK_TOKENS
from model.presets import preset
from train.estimate.blocks import GRADIENT_BYTES, BlockWork, block_works, head_products, logits_moved
from train.estimate.calibration import Calibration, StepPoint
from train.estimate.rates import Rates

# Steps of so few tokens show the host's time.
_FEW_TOKENS = 1024


@dataclass(frozen=True)
class HostSeconds:
    """What the host takes to launch a pass: of each block, and once."""

    block: float
    rest: float


@dataclass(frozen=True)
class Coefficients:
    """See the module's docstring."""

    # By the way that blocks run (model.compilation), then by the kind of layer; "" for a kind that was not measured.
    elementwise: dict[str, dict[str, float]]
    forward_share: float
    logits: float
    # Bytes that an update moves for each parameter that a rank holds the optimizer of, and what it takes besides.
    update_bytes: float
    update_seconds: float
    # By the way that blocks run.
    host: dict[str, HostSeconds]
    # What was not measured, and taken as below.
    assumed: list[str] = field(default_factory=list)

    def elementwise_of(self, execution: str, kind: str) -> float:
        """Of blocks of a kind that run so; a kind that was not measured has the mean of the others."""
        of_kinds = self.elementwise.get(execution) or self.elementwise[COMPILED]
        return of_kinds.get(kind, of_kinds[""])


# As an H200 has them, with torch 2.11 and Triton 3.6: of a calibration without steps of an engine.
TYPICAL = Coefficients(
    elementwise={
        WRITTEN: {"": 4.6},
        COMPILED: {"": 3.0},
        CAPTURED: {"": 3.0},
    },
    forward_share=0.4,
    logits=3.0,
    update_bytes=60.0,
    update_seconds=0.004,
    host={
        WRITTEN: HostSeconds(6.1e-3, 5e-3),
        COMPILED: HostSeconds(4.3e-3, 5e-3),
        CAPTURED: HostSeconds(1.5e-3, 5e-3),
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
        elementwise = {execution: self._elementwise(execution, host) for execution in TYPICAL.elementwise}
        update_bytes, update_seconds = self._update()
        return Coefficients(
            elementwise=elementwise,
            forward_share=self._forward_share(),
            logits=self._logits(),
            update_bytes=update_bytes,
            update_seconds=update_seconds,
            host=host,
            assumed=self.assumed,
        )

    def _host(self, execution: str) -> HostSeconds:
        for point in self._points:
            if point.tokens <= _FEW_TOKENS and point.step.execution == execution:
                return HostSeconds(max(point.block, 0.0), max(point.rest, 0.0))
        self.assumed.append(f"the host's time of {execution} blocks")
        return TYPICAL.host[execution]

    def _elementwise(self, execution: str, host: dict[str, HostSeconds]) -> dict[str, float]:
        of_kinds: dict[str, list[float]] = {}
        for point in self._points:
            step = point.step
            waits = point.block < 1.1 * host[execution].block
            if step.execution != execution or step.activation_checkpointing != "none" or waits:
                continue
            if point.tokens > _FEW_TOKENS:
                work = self._work(point)
                of_kinds.setdefault(point.kind, []).append(max(0.0, (point.block - self._counted(work)) / work.moved))
        if not of_kinds:
            self.assumed.append(f"the bytes that {execution} blocks move")
            return TYPICAL.elementwise[execution]
        means = {kind: sum(values) / len(values) for kind, values in of_kinds.items()}
        return {**means, "": sum(means.values()) / len(means)}

    def _forward_share(self) -> float:
        shares = []
        for point in self._points:
            step = point.step
            if step.activation_checkpointing == "none":
                continue
            for other in self._points:
                keeps_all = other.step.activation_checkpointing == "none" and other.step.execution == step.execution
                if keeps_all and _is_alike(other.step, step):
                    work = self._work(point)
                    whole = max(other.block - self._counted(work), 1e-9)
                    shares.append((point.block - other.block - work.products - work.cell_forward) / whole)
        if not shares:
            self.assumed.append("the forward pass's share of the bytes that blocks move")
            return TYPICAL.forward_share
        return min(1.0, max(0.0, sum(shares) / len(shares)))

    def _logits(self) -> float:
        found = []
        for point in self._points:
            if point.tokens < LOSS_CHUNK_TOKENS or point.step.activation_checkpointing != "none":
                continue
            counted = head_products(point.config, point.tokens, self._rates)
            counted += self._rates.moving(GRADIENT_BYTES * 2 * point.config.vocab_size * point.config.d_model)
            found.append((point.rest - counted) / logits_moved(point.config, point.tokens, self._rates))
        if not found:
            self.assumed.append("the bytes that the head moves")
            return TYPICAL.logits
        return max(0.0, sum(found) / len(found))

    def _update(self) -> tuple[float, float]:
        pairs = [(count_parameters(_model(step)).total, step.update_seconds) for step in self._steps]
        if len({parameters for parameters, _ in pairs}) < 2:
            self.assumed.append("the time of an update")
            return TYPICAL.update_bytes, TYPICAL.update_seconds
        slope, intercept = _line(pairs)
        return max(0.0, slope / self._rates.moving(1.0)), max(0.0, intercept)

    def _work(self, point: _Point) -> BlockWork:
        batch = (point.step.micro_batch_size, point.step.sequence_length)
        return block_works(point.config, *batch, self._hardware, self._rates)[point.kind]

    def _counted(self, work: BlockWork) -> float:
        return work.counted + self._rates.moving(GRADIENT_BYTES * work.parameters)


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
    return (step.n_blocks, step.model, batch, step.execution, step.activation_checkpointing)


def _is_alike(one: StepPoint, other: StepPoint) -> bool:
    return _key(one)[:3] == _key(other)[:3]


def _model(step: StepPoint) -> ModelConfig:
    return _preset(step.model, step.n_blocks)


@lru_cache
def _preset(name: str, n_blocks: int) -> ModelConfig:
    return preset(name, n_blocks=n_blocks)


def _line(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and intercept of the line with the least squares."""
    count = len(pairs)
    mean_x, mean_y = (sum(values) / count for values in zip(*pairs, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / sum((x - mean_x) ** 2 for x, _ in pairs)
    return slope, mean_y - slope * mean_x

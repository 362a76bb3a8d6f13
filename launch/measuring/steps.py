"""Steps of the trainer's engine on one GPU, with models of a few blocks: times of a pass and of an update, memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.reading.batch import Batch
from model.accounting import parameter_shapes
from model.compilation import CAPTURED, WRITTEN
from model.config import ModelConfig
from model.initialisation import initialise_parameter
from model.stages import Stage
from train.config import LoggingConfig, ParallelConfig, PrecisionConfig, RunConfig, TrainingConfig
from train.estimate.calibration import CALIBRATION_MICRO_BATCHES, StepPoint
from train.estimate.models import model_of_steps
from train.parallel.engine import Engine, make_engine
from train.parallel.fragments import ReadRange
from train.parallel.mesh import Mesh
from train.plan import make_plan

_DOCUMENT_TOKENS = 1000
_WARM_UP = 3
# Of values that are drawn; weights repeat them.
_DRAWN = 2**20


@dataclass(frozen=True)
class Shape:
    """A micro-batch, and how a pass over it runs."""

    micro_batch_size: int
    sequence_length: int
    execution: str
    activation_checkpointing: str = "none"


@dataclass(frozen=True)
class Steps:
    """What one engine measures: a model of conf/model/ with so many blocks."""

    model: str
    n_blocks: int
    shapes: tuple[Shape, ...]
    # The kind of all blocks; None: the model's own.
    block: str | None = None

    @property
    def config(self) -> ModelConfig:
        return model_of_steps(self.model, self.n_blocks, self.block)

    def describe(self) -> str:
        return f"{self.model} with {self.n_blocks} {f'{self.block} ' if self.block else ''}blocks"


@dataclass(frozen=True)
class Effort:
    """How long steps are repeated once they are compiled, and how many times at least."""

    for_seconds: float
    at_least: int


def measure_steps(steps: Steps, mesh: Mesh, effort: Effort) -> Iterator[StepPoint]:
    """Times of the model's steps in each shape."""
    config = run_config(steps.config, steps.shapes[0])
    # CUDA graphs of engines before this one may still hold some.
    before = torch.cuda.memory_allocated(mesh.device) if mesh.device.type == "cuda" else 0
    engine = make_engine(config, make_plan(config, 1), mesh)
    try:
        engine.fill(_weights(steps.config), 0)
        for shape in steps.shapes:
            yield _less(before, _measure(steps, shape, engine, effort))
    finally:
        engine.close()
        del engine
        _let_go(mesh.device)


def run_config(model: ModelConfig, shape: Shape) -> RunConfig:
    """A run whose steps are those that are measured, without what is around them."""
    return RunConfig(
        name="calibration",
        model=model,
        training=TrainingConfig(
            sequence_length=shape.sequence_length,
            global_batch_size=CALIBRATION_MICRO_BATCHES * shape.micro_batch_size,
            micro_batch_size=shape.micro_batch_size,
            total_steps=1_000_000,
            compile=shape.execution != WRITTEN,
            cuda_graphs=shape.execution == CAPTURED,
        ),
        parallel=ParallelConfig(zero_stage=1, activation_checkpointing=shape.activation_checkpointing),
        precision=PrecisionConfig("bf16"),
        logging=LoggingConfig(monitor_interval=0),
    )


def _less(before: int, step: StepPoint) -> StepPoint:
    """Without what was allocated before. The allocator does not see what passes played from CUDA graphs take."""
    if step.peak_bytes is None or step.lasting_bytes is None:
        return step
    peak = None if step.execution == CAPTURED else step.peak_bytes - before
    return dataclasses.replace(step, peak_bytes=peak, lasting_bytes=step.lasting_bytes - before)


def _measure(steps: Steps, shape: Shape, engine: Engine, effort: Effort) -> StepPoint:
    stage, device = engine.model, engine.mesh.device
    assert isinstance(stage, Stage)
    stage.execution, stage.activation_checkpointing = shape.execution, shape.activation_checkpointing
    batches = [_batch(shape, steps.config.vocab_size) for _ in range(CALIBRATION_MICRO_BATCHES)]
    valid = torch.tensor(float(sum(batch.scored_targets() for batch in batches)), device=device)
    # A CPU has nothing to compile or to record.
    for _ in range(_WARM_UP if device.type == "cuda" else 1):
        _step(engine, batches, valid)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began, passes, updates = time.perf_counter(), list[float](), list[float]()
    while len(passes) < effort.at_least or time.perf_counter() - began < effort.for_seconds:
        of_passes, of_update = _step(engine, batches, valid)
        passes.append(of_passes / CALIBRATION_MICRO_BATCHES)
        updates.append(of_update)
    on_gpu = device.type == "cuda"
    return StepPoint(
        steps.model,
        steps.n_blocks,
        **dataclasses.asdict(shape),
        pass_seconds=statistics.median(passes),
        update_seconds=statistics.median(updates),
        peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        lasting_bytes=torch.cuda.memory_allocated(device) if on_gpu else None,
        block=steps.block,
    )


def _step(engine: Engine, batches: list[Batch], valid: Tensor) -> tuple[float, float]:
    """Seconds of the passes, and of the update."""
    began = time.perf_counter()
    engine.train_batch(batches, valid)
    _wait(engine.mesh.device)
    passed = time.perf_counter()
    norm = float(engine.gradient_norm())
    if not math.isfinite(norm):
        raise ArithmeticError(f"the gradients of a calibration step are not finite ({norm})")
    engine.step(1e-5, norm)
    _wait(engine.mesh.device)
    return passed - began, time.perf_counter() - passed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _batch(shape: Shape, vocabulary: int) -> Batch:
    size = (shape.micro_batch_size, shape.sequence_length)
    tokens = torch.randint(0, vocabulary, size)
    starts = torch.rand(size) < 1 / _DOCUMENT_TOKENS
    starts[:, 0] = True
    return Batch(tokens, tokens.roll(-1, 1), starts, ["calibration"] * shape.micro_batch_size)


def _weights(model: ModelConfig) -> ReadRange:
    """Vectors as a run begins with them, matrices of noise, which is drawn once: a 7B takes long to draw."""
    shapes = parameter_shapes(model)
    drawn = 0.02 * torch.randn(_DRAWN)

    def read(name: str, offset: int, numel: int) -> Tensor:
        if len(shapes[name]) > 1:
            return drawn.repeat(-(-numel // _DRAWN))[:numel]
        return initialise_parameter(model, name, shapes[name], 0).reshape(-1).narrow(0, offset, numel)

    return read


def _let_go(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(device)
        torch.cuda.empty_cache()

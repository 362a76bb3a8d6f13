"""How far plans are from what was measured with the same calibration."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from launch.measuring.steps import Shape, Steps, run_config
from model.presets import preset
from train.config import LoggingConfig, ParallelConfig, RunConfig, TrainingConfig
from train.estimate.calibration import Calibration, RunPoint
from train.estimate.machine import Machine
from train.estimate.step_time import BETWEEN_STEPS
from train.plan import Plan, make_plan


@dataclass(frozen=True)
class Errors:
    """The largest relative errors of time and of memory over so many measured runs, and the median ones; null: none was
    measured."""

    # Runs of the trainer; else steps of the calibration itself.
    of_runs: bool
    count: int
    time: float | None
    memory: float | None
    median_time: float | None = None
    median_memory: float | None = None

    def describe(self) -> str:
        what = "runs" if self.of_runs else "steps of the calibration, and not compared with whole runs"
        if not self.count:
            return "compared with no measured step: how far off plans are is not known"
        errors = (("time", self.time, self.median_time), ("memory", self.memory, self.median_memory))
        found = [
            f"{name} within {percent(error)} % (half of them within {percent(median)} %)"
            for name, error, median in errors
            if error is not None and median is not None
        ]
        return f"plans of {self.count} measured {what}: {', '.join(found)}"


def percent(share: float) -> float:
    """In percent, rounded up to a tenth."""
    return math.ceil(1000 * share) / 10


@dataclass(frozen=True)
class Compared:
    """A measured point beside its plan. A measured value that is not known is null, as is its error."""

    what: str
    planned_seconds: float
    measured_seconds: float | None
    planned_bytes: float
    measured_bytes: float | None

    @property
    def time_error(self) -> float | None:
        """(planned - measured) / measured."""
        return None if self.measured_seconds is None else self.planned_seconds / self.measured_seconds - 1

    @property
    def memory_error(self) -> float | None:
        return None if self.measured_bytes is None else self.planned_bytes / self.measured_bytes - 1


def errors_of(calibration: Calibration) -> Errors:
    """By its runs of the trainer; where it has none, by its steps."""
    compared = list(compared_runs(calibration)) or list(compared_steps(calibration))
    times = [abs(one.time_error) for one in compared if one.time_error is not None]
    memories = [abs(one.memory_error) for one in compared if one.memory_error is not None]
    return Errors(
        of_runs=bool(calibration.runs),
        count=len(compared),
        time=max(times, default=None),
        memory=max(memories, default=None),
        median_time=statistics.median(times) if times else None,
        median_memory=statistics.median(memories) if memories else None,
    )


def compared_runs(calibration: Calibration) -> Iterator[Compared]:
    """Every run of the calibration beside its plan."""
    for run in calibration.runs:
        plan = plan_of_run(calibration, run)
        rate = run.tokens_per_second_per_gpu
        assert plan.step_seconds is not None
        yield Compared(
            f"{run.model} {run.training} {run.parallel} on {run.ranks}",
            plan.step_seconds.total,
            None if rate is None else plan.tokens_per_step / plan.world_size / rate,
            plan.rank_bytes,
            run.peak_bytes,
        )


def plan_of_run(calibration: Calibration, run: RunPoint) -> Plan:
    """The plan that a measured run would have had."""
    config = RunConfig(
        name="run",
        model=preset(run.model),
        training=TrainingConfig(total_steps=1_000_000, **run.training),
        parallel=ParallelConfig(**run.parallel),
        logging=LoggingConfig(monitor_interval=0),
    )
    return make_plan(config, run.ranks, machine=Machine(calibration, run.nodes, run.ranks))


def compared_steps(calibration: Calibration) -> Iterator[Compared]:
    """Every step of the calibration beside its plan."""
    machine = Machine(calibration, 1, 1)
    for step in calibration.steps:
        shape = Shape(**{field.name: getattr(step, field.name) for field in dataclasses.fields(Shape)})
        steps = Steps(step.model, step.n_blocks, (shape,), step.block)
        plan = make_plan(run_config(steps.config, shape), 1, machine=machine)
        assert plan.step_seconds is not None
        yield Compared(
            f"{steps.describe()}, {shape.micro_batch_size} x {shape.sequence_length}, {shape.execution}, "
            f"recomputing {shape.activation_checkpointing}",
            # The engine alone was measured.
            plan.step_seconds.total - BETWEEN_STEPS,
            plan.gradient_accumulation_steps * step.pass_seconds + step.update_seconds,
            plan.rank_bytes,
            step.peak_bytes,
        )

"""`python -m launch calibrate output=FILE`: measure this machine's GPU for the plans of runs on others of its kind.

One process measures operations and steps. Several (under torchrun or srun) measure the collectives among them, and add
those to a file that one process has written.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import psutil
import torch

from conf import ConfigError, compose
from conf.problems import local_folder, positive
from conf.slurm_variables import become_rank
from launch.measuring import operations
from launch.measuring.collectives import measure_collectives
from launch.measuring.steps import Effort, Shape, Steps, measure_steps
from model.compilation import CAPTURED, COMPILED, WRITTEN
from model.hardware import CPU
from train.estimate.calibration import Calibration, CellPoint, ProductPoint, StepPoint, read_calibration
from train.parallel.mesh import Mesh, join_mesh, launched_processes
from train.run_directory import code_revision, environment_description

_TIMEOUT = timedelta(minutes=10)
# What is begun in this time before the end may not be finished by then.
_RESERVE = 15.0


@dataclass(frozen=True)
class CalibrateConfig:
    """What is measured, and where to."""

    # The file that is written; with several processes, the one that the collectives are added to.
    output: str
    # After so many seconds nothing further is begun; what is missing is said.
    seconds: float
    # Shapes that a CPU computes in seconds too. Such a file says nothing about training, and is for tests.
    tiny: bool


@dataclass(frozen=True)
class Program:
    """What is to be measured, what matters most first."""

    copy_mib: int
    collective_mib: int
    # (tokens, width)
    products: list[tuple[int, int]]
    cells: list[partial[CellPoint]]
    # The first ones come before all cells but the first.
    steps: list[Steps]
    effort: Effort = Effort(for_seconds=1.0, at_least=5)


def full_program() -> Program:
    """Of a GPU with 80 GB or more."""
    long, short = Shape(4, 4096, COMPILED), Shape(1, 512, COMPILED)
    captured = [dataclasses.replace(shape, execution=CAPTURED) for shape in (Shape(8, 2048, COMPILED), short)]
    recomputing = [dataclasses.replace(long, activation_checkpointing=mode) for mode in ("unit", "block")]
    return Program(
        copy_mib=2048,
        collective_mib=512,
        products=[(tokens, width) for width in (512, 1024, 2048, 4096, 8192) for tokens in (2048, 8192, 32768)],
        cells=[
            partial(operations.mlstm_cell, 4, 4096, 4, 256, 512),
            partial(operations.mlstm_cell, 1, 8192, 8, 256, 512),
            partial(operations.mlstm_cell, 8, 2048, 4, 128, 256),
            partial(operations.mlstm_cell, 4, 2048, 4, 1024, 1024),
            partial(operations.slstm_cell, 8, 2048, 4, 512),
            partial(operations.slstm_cell, 8, 2048, 4, 256),
            partial(operations.attention_cell, 4, 4096, 16, 128),
        ],
        steps=[
            Steps("xlstm_1b4", 2, (long,)),
            Steps("xlstm_1b4", 6, (long, dataclasses.replace(long, execution=WRITTEN), *recomputing)),
            Steps("xlstm_7b", 2, (Shape(1, 8192, COMPILED),)),
            Steps("xlstm_7b", 4, (Shape(1, 8192, COMPILED),)),
            Steps("xlstm_400m", 2, (short, *captured)),
            Steps("xlstm_400m", 8, (short, dataclasses.replace(short, execution=WRITTEN), *captured)),
            Steps("neurips_1b3_1_0", 2, (Shape(4, 2048, COMPILED),)),
            Steps("neurips_1b3_1_0", 6, (Shape(4, 2048, COMPILED),)),
            Steps("llama_1b4", 2, (long,)),
            Steps("llama_1b4", 6, (long,)),
            Steps("xlstm_7b_mixed", 2, (Shape(2, 4096, COMPILED),), "slstm"),
            Steps("xlstm_7b_mixed", 6, (Shape(2, 4096, COMPILED),), "slstm"),
        ],
    )


def _tiny() -> Program:
    shape = Shape(1, 64, WRITTEN)
    return Program(
        copy_mib=8,
        collective_mib=2,
        products=[(tokens, width) for width in (32, 128) for tokens in (64, 256)],
        cells=[
            partial(operations.mlstm_cell, 1, 64, 2, 16, 32),
            partial(operations.slstm_cell, 1, 16, 2, 16),
            partial(operations.attention_cell, 1, 64, 2, 16),
        ],
        steps=[
            Steps("tiny_mlstm", 1, (shape,)),
            Steps("tiny_mlstm", 3, (shape, dataclasses.replace(shape, activation_checkpointing="block"))),
        ],
        effort=Effort(for_seconds=0.0, at_least=1),
    )


@dataclass
class _Found:
    products: list[ProductPoint] = field(default_factory=list)
    cells: list[CellPoint] = field(default_factory=list)
    steps: list[StepPoint] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def calibrate(arguments: Sequence[str]) -> int:
    """Measure as `arguments` say, and write the file; returns the exit code. Raises ConfigError for what cannot work,
    before anything is measured."""
    config = compose(CalibrateConfig, "calibrate", list(arguments), validate_calibration)
    become_rank()
    problems = validate_calibration(config) + _unfit(config)
    before = None
    if launched_processes() > 1 and not problems:
        # What one process has measured; the collectives among these are added.
        before = read_calibration(Path(config.output))
    if problems:
        raise ConfigError(problems)
    program = _tiny() if config.tiny else full_program()
    mesh = join_mesh(_TIMEOUT)
    try:
        if before is None:
            _measure(config, program, mesh).write(Path(config.output))
        else:
            _add_collectives(before, Path(config.output), program, mesh)
        if mesh.is_main:
            _say(f"written    {config.output}")
    finally:
        mesh.close()
    return 0


def _add_collectives(before: Calibration, file: Path, program: Program, mesh: Mesh) -> None:
    """Put what these processes reach in the place of what as many on as many nodes have reached before. Collective."""
    points = measure_collectives(mesh, program.collective_mib)
    if not mesh.is_main:
        return
    measured = {(point.nodes, point.ranks) for point in points}
    others = [point for point in before.collectives if (point.nodes, point.ranks) not in measured]
    dataclasses.replace(before, collectives=[*others, *points]).write(file)
    for point in points:
        _say(f"measured   {point.operation} of {mesh.size}: {point.bytes / point.seconds / 1e9:.1f} GB/s of the whole")


def validate_calibration(config: CalibrateConfig) -> list[str]:
    """All problems of `config`, one line each."""
    problems = [*local_folder("output", config.output), *positive("seconds", config.seconds)]
    if not math.isfinite(config.seconds):
        problems.append(f"seconds: must be a number of seconds ({config.seconds})")
    if not problems and not Path(config.output).absolute().parent.is_dir():
        problems.append(f"output: there is no folder {Path(config.output).parent}; make it, or name another file")
    return problems


def _unfit(config: CalibrateConfig) -> list[str]:
    if config.tiny or torch.cuda.is_available():
        return []
    return [
        "tiny: this machine has no GPU, and what a CPU takes for a model's shapes would say nothing about one; run it "
        "on the GPU that runs are planned for, or take tiny=true to see what it does"
    ]


def _measure(config: CalibrateConfig, program: Program, mesh: Mesh) -> Calibration:
    device, began = mesh.device, time.monotonic()
    copied = operations.copy_rate(device, program.copy_mib)
    _say(f"measured   a copy: {copied / 1e12:.2f} TB/s")
    found = _Found()
    first, *others = program.cells
    tasks = [
        *(_product_task(found, size, device) for size in program.products),
        _cell_task(found, first, device),
        *(_steps_task(found, steps, mesh, program.effort) for steps in program.steps[:4]),
        *(_cell_task(found, cell, device) for cell in others),
        *(_steps_task(found, steps, mesh, program.effort) for steps in program.steps[4:]),
    ]
    for name, task in tasks:
        if time.monotonic() - began > config.seconds - _RESERVE and not config.tiny:
            found.missing.append(name)
            continue
        for line in task():
            _say(f"measured   {line}")
    if found.missing:
        _say(f"missing    after {config.seconds:.0f} s: {'; '.join(found.missing)}. Give more seconds=N for them")
    _say(f"took       {time.monotonic() - began:.0f} s")
    return Calibration(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else CPU,
        memory_bytes=_memory(device),
        provenance=_provenance(),
        copy_bytes_per_second=copied,
        products=found.products,
        cells=found.cells,
        steps=found.steps,
    )


_Task = tuple[str, Callable[[], Iterator[str]]]


def _product_task(found: _Found, size: tuple[int, int], device: torch.device) -> _Task:
    def run() -> Iterator[str]:
        point = operations.product(*size, device)
        found.products.append(point)
        yield f"products of {size[0]} x {size[1]}: {point.flops_per_second / 1e12:.0f} TFLOP/s"

    return f"products of {size[0]} x {size[1]}", run


def _cell_task(found: _Found, cell: partial[CellPoint], device: torch.device) -> _Task:
    def run() -> Iterator[str]:
        point = cell(device)
        found.cells.append(point)
        yield (
            f"{point.kind} {point.heads} x {point.key_dim}/{point.value_dim}, {point.batch} x {point.length}: "
            f"{1e3 * point.forward_seconds:.3f} ms forward, {1e3 * point.both_seconds:.3f} ms both"
        )

    return f"{cell.func.__name__}{cell.args}", run


def _steps_task(found: _Found, steps: Steps, mesh: Mesh, effort: Effort) -> _Task:
    def run() -> Iterator[str]:
        for point in measure_steps(steps, mesh, effort):
            found.steps.append(point)
            memory = "" if point.peak_bytes is None else f", {point.peak_bytes / 2**30:.2f} GiB"
            yield (
                f"{steps.describe()}, {point.micro_batch_size} x {point.sequence_length}, {point.execution}, "
                f"recomputing {point.activation_checkpointing}: {1e3 * point.pass_seconds:.1f} ms a pass, "
                f"{1e3 * point.update_seconds:.1f} ms an update{memory}"
            )

    return steps.describe(), run


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def _provenance() -> dict[str, str]:
    environment = environment_description()
    revision = code_revision(Path(__file__).resolve().parents[1])["revision"]
    packages = {name: version for name, version in environment["packages"].items() if version}
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": revision or "unknown",
        "command": "python -m launch " + " ".join(environment["command"][1:]),
        "python": environment["python"],
        **{name: packages[name] for name in ("torch", "triton", "deepspeed") if name in packages},
        "driver": _driver(),
    }


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    return (done.stdout.split() or ["unknown"])[0]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

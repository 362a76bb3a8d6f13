"""What was measured of one kind of GPU, as `python -m launch calibrate` writes it and the plan of a run reads it.

The file is JSON and holds measurements alone, each with the shape that it is of. What the plan makes of them is in
train/estimate/coefficients.py, so that a file stays good where the model of time gets better.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.problems import ConfigError, other_format
from train.run_directory import write_atomically

FORMAT_VERSION = 1
# Of each step that a calibration measures.
CALIBRATION_MICRO_BATCHES = 2
# Files of the GPUs that were measured for everyone; a file's name is what `gpu` calls it.
SHIPPED = Path(__file__).parent / "calibrations"


@dataclass(frozen=True)
class ProductPoint:
    """The three bf16 products of a dense layer of `width` in and out: its output, both gradients; no host time."""

    tokens: int
    width: int
    seconds: float

    @property
    def flops_per_second(self) -> float:
        return 6.0 * self.tokens * self.width**2 / self.seconds


@dataclass(frozen=True)
class CellPoint:
    """A cell alone: mLSTM, sLSTM or causal attention over `batch` sequences of `length` tokens; no host time."""

    # mlstm, slstm or attention.
    kind: str
    heads: int
    # Of a head; of the sLSTM and of attention both are its width.
    key_dim: int
    value_dim: int
    batch: int
    length: int
    forward_seconds: float
    # Forward and backward.
    both_seconds: float


@dataclass(frozen=True)
class StepPoint:
    """A step of the trainer's engine with ZeRO-1 in bf16 on one GPU: a model of conf/model/ with so many blocks."""

    model: str
    n_blocks: int
    micro_batch_size: int
    sequence_length: int
    # Of model.compilation, and of model.recomputation.
    execution: str
    activation_checkpointing: str
    # Of one micro-batch, forward and backward, host included.
    pass_seconds: float
    # Of the gradient's norm, clipping and the optimizer.
    update_seconds: float
    # Allocated at most, and between steps; null where it is not known, as on a CPU.
    peak_bytes: int | None
    lasting_bytes: int | None
    # The kind of all blocks, where it is not that of the model.
    block: str | None = None


@dataclass(frozen=True)
class CollectivePoint:
    """A collective of all processes. `bytes`: of the whole tensor that is summed or gathered."""

    # all_reduce or all_gather.
    operation: str
    nodes: int
    ranks: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class RunPoint:
    """A run of `python -m train` without statistics, measured apart from the calibration, whose error it shows."""

    # Of conf/model/; of the sections `training` and `parallel`, what is not as train/config.py has it.
    model: str
    training: dict[str, Any]
    parallel: dict[str, Any]
    nodes: int
    ranks: int
    tokens_per_second_per_gpu: float | None
    peak_bytes: int | None
    # Where the figures are from.
    source: str


@dataclass(frozen=True)
class Calibration:
    """Measurements of one kind of GPU, and where they are from."""

    # As torch.cuda.get_device_name says it; CPU for one without a GPU.
    device: str
    memory_bytes: int
    # Date, commit, command, versions, driver.
    provenance: dict[str, str]
    # Bytes read and written by a large copy.
    copy_bytes_per_second: float
    products: list[ProductPoint]
    cells: list[CellPoint]
    steps: list[StepPoint] = field(default_factory=list)
    collectives: list[CollectivePoint] = field(default_factory=list)
    runs: list[RunPoint] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        write_atomically(path, _with_a_point_a_line(content))


_POINTS: dict[str, type] = {
    "products": ProductPoint,
    "cells": CellPoint,
    "steps": StepPoint,
    "collectives": CollectivePoint,
    "runs": RunPoint,
}


def shipped() -> list[str]:
    """The names of the GPUs whose calibrations come with this package."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def read_calibration(path: Path) -> Calibration:
    """Read a file. Raises ConfigError where there is none, or it is no calibration, with what to do."""
    mend = "name a file of `python -m launch calibrate`, or measure again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"calibration: {path} cannot be read ({error}); {mend}"]) from None
    if not isinstance(content, dict):
        raise ConfigError([f"calibration: {path} holds no calibration; {mend}"])
    if problem := other_format(path, content.pop("format_version", None), FORMAT_VERSION):
        raise ConfigError([f"calibration: {problem}"])
    try:
        for name, kind in _POINTS.items():
            content[name] = [kind(**point) for point in content.get(name, [])]
        found = Calibration(**content)
        problems = list(_problems(found))
    except (TypeError, AttributeError, KeyError) as error:
        raise ConfigError([f"calibration: {path} holds no calibration ({error}); {mend}"]) from None
    if problems:
        raise ConfigError([f"calibration: {path}: {problem}; {mend}" for problem in problems])
    return found


def _problems(found: Calibration) -> Any:
    if not found.products:
        yield "products is empty"
    if not found.copy_bytes_per_second > 0:
        yield f"copy_bytes_per_second must be positive ({found.copy_bytes_per_second})"
    for name in ("products", "cells", "steps", "collectives"):
        for number, point in enumerate(getattr(found, name)):
            for key, value in dataclasses.asdict(point).items():
                if isinstance(value, (int, float)) and not value > 0:
                    yield f"{name}[{number}].{key} must be positive ({value})"


def _with_a_point_a_line(content: dict[str, Any]) -> str:
    """JSON that people can read: a list of points has one of them a line."""
    lines = []
    for key, value in content.items():
        if key in _POINTS and value:
            points = ",\n".join(f"  {json.dumps(point)}" for point in value)
            lines.append(f" {json.dumps(key)}: [\n{points}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"

"""Whether a checkpoint is whole, down to its numbers, for `python -m train.checkpoint verify`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from model.marker import read_marker
from train.checkpoints.reader import faults

# Numbers of a tensor that are in memory at once.
_PIECE = 1 << 24


def problems_of(folder: Path) -> list[str]:
    """Everything that is wrong with a checkpoint: files that are not as the marker says, or not what they should be;
    where these are right, numbers that are not finite. One line each; [] when all is well."""
    if found := [fault.problem for fault in faults(folder)]:
        return found
    try:
        return list(_numbers_that_are_not_finite(folder))
    except Exception as error:  # noqa: BLE001 - tensors of any content fail in more ways than can be listed
        return [f"{folder} cannot be read ({type(error).__name__}: {error})"]


def _numbers_that_are_not_finite(folder: Path) -> Iterator[str]:
    for name in sorted(read_marker(folder).files):
        if name.endswith(".safetensors"):
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if count := sum(int((~torch.isfinite(piece)).sum()) for piece in _pieces(file, key)):
                        yield f"{folder / name}: {count} numbers of {key} are not finite"


def _pieces(file: Any, key: str) -> Iterator[torch.Tensor]:
    """A tensor, some of its rows at a time."""
    stored = file.get_slice(key)
    if not stored.get_shape():
        yield file.get_tensor(key)
        return
    rows, *rest = stored.get_shape()
    step = max(1, _PIECE // max(1, math.prod(rest)))
    for start in range(0, rows, step):
        yield stored[start : start + step]

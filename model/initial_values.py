"""First values of parameters, by rule. A rule takes a shape and a generator, and gives float32 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

if TYPE_CHECKING:
    from model.config import ModelConfig

Shape = tuple[int, ...]
InitialValue = Callable[[Shape, Generator], Tensor]


def empty(shape: Shape) -> Tensor:
    """Where every rule begins: the same place and precision whatever PyTorch's defaults are."""
    return torch.empty(shape, device="cpu", dtype=torch.float32)


def constant(value: float) -> InitialValue:
    """Every element is `value`."""
    return lambda shape, generator: empty(shape).fill_(value)


def normal(std: float) -> InitialValue:
    """Mean 0, standard deviation `std`."""
    return lambda shape, generator: empty(shape).normal_(0.0, std, generator=generator)


def uniform(bound: float) -> InitialValue:
    """Evenly within `bound` of 0."""
    return lambda shape, generator: empty(shape).uniform_(-bound, bound, generator=generator)


def spread(first: float, last: float) -> InitialValue:
    """Evenly from `first` to `last` over the first axis, the only one."""
    return lambda shape, generator: torch.linspace(first, last, shape[0], device="cpu", dtype=torch.float32)


def reads_stream(config: ModelConfig) -> InitialValue:
    """For a map that reads the residual stream: std sqrt(2 / (5 d_model)) (Nguyen & Salazar, arXiv 1910.05895)."""
    return normal(math.sqrt(2 / (5 * config.d_model)))


def writes_stream(config: ModelConfig) -> InitialValue:
    """For a map that writes to it: std 2 / (n_blocks sqrt(d_model)), d_model whatever the width of its input."""
    return normal(2 / (config.n_blocks * math.sqrt(config.d_model)))

"""Blocks compiled by torch.compile: many small kernels of PyTorch become a few that read and write memory once.

What is compiled is one block, as a function of its weights, so that all blocks of a kind share the result. The kernels
of this project are operators, which torch.compile takes as they are. Passes that train are compiled. Those without
gradients, whose shapes vary, run as they are written, and so do passes that record statistics, for which intermediate
results would have to be kept; rounding differs between the two, no more than between two orders of the same sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from model import statistics

# Kinds of layers, with a state and without, inside recomputation and outside, of two shapes.
_VARIANTS = 64


def is_for_this_pass() -> bool:
    """Whether passes of the kind that runs now are compiled."""
    return torch.is_grad_enabled() and not statistics.is_recording()


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for each new shape and setting that it is called with."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    return torch.compile(function, dynamic=False)

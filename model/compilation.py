"""Blocks compiled by torch.compile: many small kernels of PyTorch become a few that read and write memory once.

What is compiled is one block, as a function of its weights, so that all blocks of a kind share the result. The kernels
of this project are operators, which torch.compile takes as they are. Passes that train are compiled. Those without
gradients, whose shapes vary, run as they are written, and so do passes that record statistics, for which intermediate
results would have to be kept; rounding differs between the two, no more than between two orders of the same sum.

Blocks of ranks that share a sequence exchange in their middle, where no graph can go on. Of the mLSTM block of the 7B
family the pieces before and behind the exchange are compiled (Block._in_pieces); the others are cut by torch.compile at
each call that exchanges.

A GPU that is done with each kernel before the host has launched the next one gains by captured blocks: their launches
are recorded once, as a CUDA graph, and played. Results then lie where they lay in the pass before, so that between two
passes no activation and no gradient may be in use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from model import statistics

# How blocks run in passes that train.
WRITTEN, COMPILED, CAPTURED = "written", "compiled", "captured"
# Kinds of layers, with a state and without, inside recomputation and outside, of two shapes.
_VARIANTS = 64


def begin_pass(execution: str) -> None:
    """Before the first block of a pass: what the last one left may be overwritten."""
    if execution == CAPTURED and is_for_this_pass():
        torch.compiler.cudagraph_mark_step_begin()


def runnable(function: Callable[..., Any], execution: str) -> Callable[..., Any]:
    """What to call in place of a block's `function` in the pass that runs now."""
    if execution == WRITTEN or not is_for_this_pass():
        return function
    return compiled(function, execution)


def is_for_this_pass() -> bool:
    """Whether compiled blocks run compiled in the pass that runs now: it trains, and records nothing."""
    return torch.is_grad_enabled() and not statistics.is_recording()


@functools.cache
def compiled(function: Callable[..., Any], execution: str) -> Callable[..., Any]:
    """`function` as torch.compile makes it, in every pass."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    return torch.compile(function, dynamic=False, mode="reduce-overhead" if execution == CAPTURED else None)

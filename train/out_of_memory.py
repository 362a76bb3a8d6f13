"""A run that memory ends: what was asked for, what the plan said, and which keys lower it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from train.config import RunConfig
from train.errors import RunError
from train.memory_check import ways_to_need_less
from train.plan import Plan, gib

# How PyTorch begins when the host's memory is out; a GPU's has a class of its own.
_HOST_ALLOCATOR = "DefaultCPUAllocator"


@contextlib.contextmanager
def explained(config: RunConfig, plan: Plan) -> Iterator[None]:
    """Raises RunError, with advice, in place of what PyTorch raises inside when memory is out."""
    try:
        yield
    except RuntimeError as error:
        asked = str(error).partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError):
            where = f"the GPU's memory is used up. {_use_of_gpu()}"
        elif _HOST_ALLOCATOR in asked:
            where, asked = "this machine's memory is used up", asked[asked.index(_HOST_ALLOCATOR) :]
        else:
            raise
        raise RunError(
            f"{where} ({asked}). By the plan a rank needs {gib(plan.rank_bytes)}: "
            f"{gib(plan.activation_bytes)} activations, {gib(plan.weight_bytes)} weights, {gib(plan.gradient_bytes)} "
            f"gradients, {gib(plan.optimizer_bytes)} optimizer. {ways_to_need_less(config, plan, True)}. The same "
            "command resumes from the last checkpoint"
        ) from None


def _use_of_gpu() -> str:
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return f"At the peak {gib(allocated)} were in use and {gib(reserved - allocated)} more kept by the allocator"

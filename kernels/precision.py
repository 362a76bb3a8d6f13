"""How precise the inside of an operation is, whatever the precision of its inputs."""

import contextlib

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors has it, float32 otherwise."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


@torch.compiler.assume_constant_result
def has_autocast(device_type: str) -> bool:
    """Whether autocast exists on devices of the type at all: not on "meta", for one."""
    # Before PyTorch 2.13 torch.compile could not trace into this question.
    return torch.amp.is_autocast_available(device_type)


def autocast_disabled(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context in which no operation on the tensor's device is cast to a lower precision."""
    if has_autocast(tensor.device.type):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()

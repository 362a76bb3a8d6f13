"""How precise the inside of an operation is, whatever the precision of its inputs."""

import contextlib

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors has it, float32 otherwise."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


# Asked once, not in a call: before PyTorch 2.13 torch.compile could not trace into the question, and the decorator that
# spares it this imports all of torch.compile, seconds for every process.
_HAS_AUTOCAST = {kind: torch.amp.is_autocast_available(kind) for kind in ("cpu", "cuda", "meta", "mps", "xpu", "hpu")}


def has_autocast(device_type: str) -> bool:
    """Whether autocast exists on devices of the type at all: not on "meta", for one."""
    return _HAS_AUTOCAST.get(device_type, False)


def autocast_disabled(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context in which no operation on the tensor's device is cast to a lower precision."""
    if has_autocast(tensor.device.type):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()

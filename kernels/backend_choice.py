"""Which implementation of an operation runs: the PyTorch reference on any device, or Triton kernels on a GPU."""

import importlib.util
import os
from collections.abc import Callable

from torch import Tensor

BACKENDS = ("auto", "reference", "triton")

# Found out once, here: torch.compile traces `choose`, and cannot trace into these (find_spec before PyTorch 2.13).
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads this variable when it is imported, and no later change has an effect.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_runs_on(tensor: Tensor) -> bool:
    """Whether Triton kernels can take the tensor: on a CUDA device, or on a CPU under Triton's interpreter."""
    return HAS_TRITON and (tensor.device.type == "cuda" or (tensor.device.type == "cpu" and INTERPRETED))


def choose(operation: str, backend: str, tensor: Tensor, unsupported: Callable[[], str | None]) -> str:
    """ "reference" or "triton" for a call on `tensor`.

    Args:
        operation: name for the message, such as "mLSTM".
        backend: one of BACKENDS; "auto" is Triton on a CUDA device where it supports the arguments.
        tensor: a tensor of the call.
        unsupported: says why the Triton kernels cannot do this call, or None if they can.

    Raises:
        ValueError: an unknown backend, or "triton" where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown {operation} backend {backend!r}; use one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return "reference"
    if backend == "auto":
        is_usable = tensor.device.type == "cuda" and triton_runs_on(tensor) and unsupported() is None
        return "triton" if is_usable else "reference"
    if not triton_runs_on(tensor):
        raise ValueError(
            f"{operation} backend 'triton' needs a CUDA device and the package triton, and the tensors are on "
            f"'{tensor.device}'; use backend 'reference' or 'auto'"
        )
    reason = unsupported()
    if reason is not None:
        raise ValueError(f"{operation} backend 'triton' cannot do this: {reason}; use backend 'reference' or 'auto'")
    return "triton"

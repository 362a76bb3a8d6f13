"""What the tests of Triton kernels share: where they run, inputs that show a wrong address.

The tests in interpreted/ run twice: on a CPU under Triton's interpreter (test_interpreted.py starts them), and compiled
on a CUDA device (`pytest -m gpu`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
COMPILED = not INTERPRETED and torch.cuda.is_available()
DEVICE = torch.device("cuda" if COMPILED else "cpu")
# The interpreter keeps bfloat16 as bit patterns and computes with those: silently wrong.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if COMPILED else [torch.float32, torch.float16]
# For what the interpreter cannot do: bfloat16, graphs, sizes that take too long, timing.
compiled_only = pytest.mark.skipif(not COMPILED, reason="needs a CUDA device")


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN (integers: the largest), so that what a kernel does not write shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


def padded(x: Tensor, margin: int = 16) -> Tensor:
    """The same values inside a larger buffer of NaN (bool: True): reads past any edge show, strides are larger.

    The last axis keeps stride 1; the margin is in elements of every axis, on both sides.
    """
    filler = torch.nan if x.is_floating_point() else True if x.dtype == torch.bool else torch.iinfo(x.dtype).max
    buffer = torch.full([size + 2 * margin for size in x.shape], filler, dtype=x.dtype, device=x.device)
    view = buffer[tuple(slice(margin, margin + size) for size in x.shape)]
    view.copy_(x.detach())
    return view.requires_grad_(x.requires_grad)


def far_heads(x: Tensor) -> Tensor:
    """float16 [1, S, 3, D] with the same values, the last head more than 2^31 elements behind the first."""
    stride = 2**30 + 8
    # Memory that nobody touches, 4 GiB of it, is not there on a CPU.
    buffer = torch.from_numpy(np.zeros(2 * stride + x.shape[1] * x.shape[3], dtype=np.float16)).to(x.device)
    view = buffer.as_strided(x.shape, (2 * stride, x.shape[3], stride, 1))
    view.copy_(x.detach())
    return view.requires_grad_(x.requires_grad)


def strided(x: Tensor) -> Tensor:
    """The same values with stride 3 in the last axis, NaN (bool: True) between them."""
    return padded(x[..., None], 1)[..., 0].detach().requires_grad_(x.requires_grad)

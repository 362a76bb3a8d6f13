"""The head norm and the gate behind it in plain PyTorch: the specification.

Axes: B batch, S sequence, NH heads, DV value dimension of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.precision import autocast_disabled, compute_dtype


def head_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As kernels.head_norm.head_norm, by torch's layer norm."""
    dtype = compute_dtype(h, weight)
    with autocast_disabled(h):
        return _normalised(h, weight, eps, dtype).to(h.dtype)


def gated_head_norm(h: Tensor, gate_preact: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As kernels.head_norm.gated_head_norm, by torch's layer norm."""
    dtype = compute_dtype(h, gate_preact, weight)
    with autocast_disabled(h):
        return (torch.sigmoid(gate_preact.to(dtype)) * _normalised(h, weight, eps, dtype)).to(h.dtype)


def _normalised(h: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return F.layer_norm(h.to(dtype), h.shape[-1:], eps=eps).flatten(-2) * weight.to(dtype)

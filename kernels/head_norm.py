"""Layer normalisation of each head by itself, on what a recurrence puts out.

Axes: B batch, S sequence, NH heads, DV value dimension of a head.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.precision import autocast_disabled, compute_dtype


def head_norm(h: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Normalise every head of every token to mean 0 and variance 1, then scale. There is no bias.

    Source: xLSTM (arXiv 2405.04517), figures 10 and 11 ("GN"); xLSTM-7B uses eps = 1e-6.

    Args:
        h: [B, S, NH, DV], any floating dtype.
        weight: [NH * DV], the scale.
        eps: added to the variance.

    Returns:
        [B, S, NH * DV] in h's dtype; mean, variance and scaling are computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: the shapes do not fit.
    """
    if h.dim() != 4 or weight.shape != (h.shape[2] * h.shape[3],):
        raise ValueError(
            f"head_norm needs h [B, S, NH, DV] and weight [NH * DV], got {tuple(h.shape)} and {tuple(weight.shape)}"
        )
    dtype = compute_dtype(h, weight)
    with autocast_disabled(h):
        normalised = F.layer_norm(h.to(dtype), h.shape[-1:], eps=eps).flatten(-2)
        return (normalised * weight.to(dtype)).to(h.dtype)

"""The products of a decoding step in plain PyTorch: the specification.

All is computed in float32 at least. What enters a product is rounded to the dtype of its weight first, as the layers
round it that compute one operation after the other; what leaves is rounded once.

Axes: M rows, K inputs, N outputs, F inner width, V vocabulary, NH heads, DV value dimension of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.decoding.inputs import MixerInputs, MixerWeights, NormWeights
from kernels.head_norm import reference as head_norm_reference
from kernels.precision import autocast_disabled, compute_dtype
from kernels.soft_cap import soft_cap


def mixer_inputs(x: Tensor, norm: NormWeights, weights: MixerWeights, gate_cap: float | None) -> MixerInputs:
    """As kernels.decoding.mixer_inputs."""
    with autocast_disabled(x):
        normed = _rms_norm(x, norm)
        matrices = (weights.q, weights.k, weights.v, weights.output_gate)
        features = torch.cat([_product(normed, matrix) for matrix in matrices], dim=1)
        gates = torch.cat(
            [
                _product(normed, weights.igate) + weights.igate_bias,
                _product(normed, weights.fgate) + weights.fgate_bias,
            ],
            dim=1,
        )
        return MixerInputs(features.to(x.dtype), soft_cap(gates, gate_cap))


def mixer_output(h: Tensor, gate_preact: Tensor, norm: NormWeights, weight: Tensor, residual: Tensor) -> Tensor:
    """As kernels.decoding.mixer_output."""
    with autocast_disabled(h):
        gated = head_norm_reference.gated_head_norm(h[:, None], gate_preact[:, None], *norm)
        return (_product(gated[:, 0], weight) + residual).to(residual.dtype)


def swiglu(x: Tensor, norm: NormWeights, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """As kernels.decoding.swiglu."""
    with autocast_disabled(x):
        normed = _rms_norm(x, norm)
        return (F.silu(_product(normed, gate_weight)) * _product(normed, up_weight)).to(x.dtype)


def added_product(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """As kernels.decoding.added_product."""
    with autocast_disabled(x):
        return (_product(x, weight) + residual).to(residual.dtype)


def logits(x: Tensor, norm: NormWeights, weight: Tensor, cap: float | None) -> Tensor:
    """As kernels.decoding.logits."""
    with autocast_disabled(x):
        return soft_cap(_product(_rms_norm(x, norm), weight), cap)


def _rms_norm(x: Tensor, norm: NormWeights) -> Tensor:
    dtype = compute_dtype(x, norm.norm_weight)
    weight = norm.norm_weight.to(dtype)
    return F.rms_norm(x.to(dtype), weight.shape, weight, norm.eps).to(x.dtype)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T [M, N] in float32 at least."""
    dtype = compute_dtype(x, weight)
    return F.linear(x.to(dtype), weight.to(dtype))

"""Normalisation layers without a bias.

Axes: B batch, S sequence, D model width, NH heads, DV value dimension of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.head_norm import gated_head_norm, head_norm
from kernels.precision import autocast_disabled, compute_dtype
from model import statistics


class _PreNorm(nn.Module):
    """A norm at the entry of a residual branch; reports the RMS on both of its sides as `statistics_name`."""

    def __init__(self, width: int, eps: float, statistics_name: str):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.statistics_name = statistics_name

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D] in x's dtype; the statistics are computed in float32 at least."""
        with autocast_disabled(x):
            if x.dtype == self.weight.dtype:
                y = self.normalise(x, self.weight)
            else:
                dtype = compute_dtype(x, self.weight)
                y = self.normalise(x.to(dtype), self.weight.to(dtype)).to(x.dtype)
        if statistics.is_recording():
            statistics.record_rms(f"{self.statistics_name}.input_rms", x)
            statistics.record_rms(f"{self.statistics_name}.output_rms", y)
        return y

    def normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        """Normalise the last axis of `x` and scale it; both have one dtype."""
        raise NotImplementedError


class RMSNorm(_PreNorm):
    """weight * x / sqrt(mean(x^2) + eps): the pre-norm of xLSTM-7B (arXiv 2503.13427 §3.2)."""

    def normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        # PyTorch reduces bfloat16 inputs in float32 here (a test holds it to that).
        return F.rms_norm(x, weight.shape, weight, self.eps)


class LayerNorm(_PreNorm):
    """weight * (x - mean) / sqrt(variance + eps): the pre-norm of the NeurIPS blocks (arXiv 2405.04517)."""

    def normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, None, self.eps)


def norm_class(family: str) -> type[RMSNorm] | type[LayerNorm]:
    """The norm of the residual branches and before the head in models of `family`."""
    return LayerNorm if family == "neurips" else RMSNorm


class HeadNorm(nn.Module):
    """Layer normalisation of each head of a cell's output by itself (kernels.head_norm)."""

    def __init__(self, width: int, eps: float, backend: str):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.backend = backend

    def forward(self, h: Tensor) -> Tensor:
        """[B, S, NH, DV] -> [B, S, NH * DV] in h's dtype."""
        return head_norm(h, self.weight, eps=self.eps, backend=self.backend)


class GatedHeadNorm(nn.Module):
    """The same, multiplied by a sigmoid gate (kernels.head_norm.gated_head_norm)."""

    def __init__(self, width: int, eps: float, backend: str):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.backend = backend

    def forward(self, h: Tensor, gate_preact: Tensor) -> Tensor:
        """h [B, S, NH, DV], gate_preact [B, S, NH * DV] -> [B, S, NH * DV] in h's dtype."""
        return gated_head_norm(h, gate_preact, self.weight, eps=self.eps, backend=self.backend)

"""Linear maps and the convolution of the layers. None of them initialises itself: see model/initialisation.py.

Axes: B batch, S sequence, G diagonal blocks, C channels, K kernel size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.causal_conv import causal_conv
from kernels.gate_projection import gate_projection, on_tensor_cores
from kernels.precision import autocast_disabled, compute_dtype
from model.sequence import LOCAL, SequenceContext


class Linear(nn.Linear):
    """A dense map without bias, [..., in] -> [..., out]; weight [out, in]."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Leave the memory as it is: a 7B model would otherwise draw all of its weights twice."""


class GateLinear(nn.Linear):
    """Pre-activations of one gate for every head, [B, S, in] -> [B, S, NH], always in float32 at least."""

    def __init__(self, in_features: int, n_heads: int):
        super().__init__(in_features, n_heads, bias=True)

    def reset_parameters(self) -> None:
        """Leave the memory as it is, as in Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return gate_projection(x, self.weight, self.bias)


def gate_preactivations(x: Tensor, *gates: GateLinear) -> tuple[Tensor, ...]:
    """What each of the gates gives for the same x [B, S, in]: [B, S, NH], in float32 at least.

    One product for all of them where that reads x once instead of once a gate.
    """
    if on_tensor_cores(x, gates[0].weight):
        weight, bias = torch.cat([gate.weight for gate in gates]), torch.cat([gate.bias for gate in gates])
        return gate_projection(x, weight, bias).chunk(len(gates), dim=-1)
    x = x.to(compute_dtype(x, gates[0].weight))
    return tuple(gate(x) for gate in gates)


class BlockDiagonalLinear(nn.Module):
    """A map without bias that mixes only within blocks of features, [B, S, G * in] -> [B, S, G * out].

    weight is [G, out, in]. With `full_precision` it computes, and returns, float32 at least.
    """

    def __init__(self, n_blocks: int, block_in: int, block_out: int, *, full_precision: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_blocks, block_out, block_in))
        self.full_precision = full_precision

    def forward(self, x: Tensor, by_heads: SequenceContext = LOCAL) -> Tensor:
        """Of ranks that share a sequence `by_heads`, x holds the blocks of this rank alone."""
        weight = by_heads.own_heads(self.weight)
        if not self.full_precision:
            return self._map(x, weight)
        dtype = compute_dtype(x, weight)
        with autocast_disabled(x):
            return self._map(x.to(dtype), weight.to(dtype))

    def _map(self, x: Tensor, weight: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (weight.shape[0], weight.shape[2]))
        return torch.einsum("bsgi,goi->bsgo", blocks, weight).flatten(-2)


class CausalConv(nn.Module):
    """Depthwise causal convolution over time (kernels.causal_conv); weight [C, 1, K], bias [C]."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        # How many inputs before x the convolution sees. Not from the weight, which a sharded engine takes apart.
        self.history = kernel_size - 1
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(
        self, x: Tensor, document_start: Tensor | None, tail: Tensor | None, by_heads: SequenceContext = LOCAL
    ) -> tuple[Tensor, Tensor]:
        """x [B, S, C], document_start [B, S] bool, tail [B, K - 1, C] -> y [B, S, C] and the tail behind x.

        Of ranks that share a sequence `by_heads`, x and tail hold the channels of this rank alone.
        """
        weight, bias = by_heads.own_heads(self.weight), by_heads.own_heads(self.bias)
        return causal_conv(x, weight, bias, document_start=document_start, tail=tail)

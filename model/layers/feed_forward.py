"""Feed-forward layers, one for the blocks of each family. Axes: B batch, S sequence, D model width, F inner width."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from model.hardware import Hardware
from model.initial_values import reads_stream, writes_stream
from model.layers import base
from model.layers.base import Parameter
from model.projections import Linear

if TYPE_CHECKING:
    from model.config import ModelConfig


class SwiGLU(nn.Module):
    """W_down(SiLU(W_gate x) * W_up x), without biases: the 7B block and Llama (arXiv 2503.13427 §3.1)."""

    def __init__(self, d_model: int, ffn_dim: int):
        super().__init__()
        self.gate_proj = Linear(d_model, ffn_dim)
        self.up_proj = Linear(d_model, ffn_dim)
        self.down_proj = Linear(ffn_dim, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GatedGELU(nn.Module):
    """W_down(GELU(a) * b) with (a, b) the halves of W_up x: the NeurIPS sLSTM block (arXiv 2405.04517, figure 10)."""

    def __init__(self, d_model: int, ffn_dim: int):
        super().__init__()
        self.up_proj = Linear(d_model, 2 * ffn_dim)
        self.down_proj = Linear(ffn_dim, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        gate, value = self.up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.gelu(gate) * value)


def feed_forward(config: ModelConfig) -> SwiGLU | GatedGELU:
    """The layer of this family's blocks, for kinds that have one."""
    layer = GatedGELU if config.family == "neurips" else SwiGLU
    return layer(config.d_model, inner_width(config))


def inner_width(config: ModelConfig) -> int:
    """F of a model whose blocks have a feed-forward layer."""
    assert config.ffn_dim is not None, "the configuration was not validated"
    return config.ffn_dim


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Every parameter of the layer, in the module's order."""
    d_model, inner = config.d_model, inner_width(config)
    # GatedGELU keeps both halves in one matrix.
    up = {"up_proj": 2 * inner} if config.family == "neurips" else {"gate_proj": inner, "up_proj": inner}
    reads, writes = reads_stream(config), writes_stream(config)
    maps = {
        f"{name}.weight": Parameter((width, d_model), base.FEED_FORWARD, reads, base.FEED_FORWARD_FLOPS)
        for name, width in up.items()
    }
    down = Parameter((d_model, inner), base.FEED_FORWARD, writes, base.FEED_FORWARD_FLOPS)
    return maps | {"down_proj.weight": down}


def token_flops(config: ModelConfig) -> float:
    """FLOPs of one token beside the products with parameters: the activation and the gating."""
    return 2.0 * inner_width(config)


def activation_bytes(config: ModelConfig, hardware: Hardware) -> float:
    """Bytes per token that the layer and the norm before it keep for the backward pass.

    Of F wide tensors both projections, the activation and the product; compiled, the activation is computed again.
    """
    wide = 3 if hardware.compiles else 4
    return hardware.compute_bytes * (2 * config.d_model + wide * inner_width(config))

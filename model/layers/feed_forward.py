"""Feed-forward layers. Axes: B batch, S sequence, D model width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.projections import Linear


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

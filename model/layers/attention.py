"""Causal multi-head attention with rotary positions: the mixer of the Llama baselines and of hybrids.

Axes: B batch, S sequence, T cached tokens, NH query heads, NKV key/value heads, DH head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.precision import autocast_disabled, compute_dtype
from model.config import ModelConfig
from model.projections import Linear
from model.state import AttentionState


class Attention(nn.Module):
    """softmax(q k^T / sqrt(DH)) v within each document, positions counted from the document's start.

    Llama 2 (arXiv 2307.09288) with rotary positions (arXiv 2104.09864); the baseline of arXiv 2510.02228.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        attention = config.attention
        self.n_heads, self.n_kv_heads = attention.n_heads, attention.n_kv_heads
        self.head_dim = config.d_model // attention.n_heads
        self.rope_theta = attention.rope_theta
        self.q_proj = Linear(config.d_model, self.n_heads * self.head_dim)
        self.k_proj = Linear(config.d_model, self.n_kv_heads * self.head_dim)
        self.v_proj = Linear(config.d_model, self.n_kv_heads * self.head_dim)
        self.out_proj = Linear(self.n_heads * self.head_dim, config.d_model)

    def forward(
        self, x: Tensor, document_start: Tensor | None, state: AttentionState | None, return_state: bool
    ) -> tuple[Tensor, AttentionState | None]:
        """x [B, S, D], document_start [B, S] bool or None -> y [B, S, D] and the grown cache, if asked for."""
        q = self.q_proj(x).unflatten(-1, (self.n_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.n_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.n_kv_heads, self.head_dim))
        position = document_positions(x, document_start, state)
        q, k = rotate(q, position, self.rope_theta), rotate(k, position, self.rope_theta)
        mask = attention_mask(x.shape[1], document_start, state)
        if state is not None:
            k = torch.cat([state.keys.to(k.dtype), k], dim=1)
            v = torch.cat([state.values.to(v.dtype), v], dim=1)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )
        new_state = None
        if return_state:
            new_state = AttentionState(k, v, (position[:, -1] + 1).expand(x.shape[0]))
        return self.out_proj(y.transpose(1, 2).flatten(-2)), new_state


def document_positions(x: Tensor, document_start: Tensor | None, state: AttentionState | None) -> Tensor:
    """The position of each token of x [B, S, ...] in its document: [B, S] int64, or [1, S] where all rows agree."""
    index = torch.arange(x.shape[1], device=x.device)[None]
    continued = index if state is None else index + state.position[:, None]
    if document_start is None:
        return continued
    last_start = torch.where(document_start, index, -1).cummax(dim=1).values
    return torch.where(last_start >= 0, index - last_start, continued)


def attention_mask(length: int, document_start: Tensor | None, state: AttentionState | None) -> Tensor | None:
    """[B, 1, S, T + S] bool, True where a query of this call may look; None: plain causal attention suffices."""
    if document_start is None and state is None:
        return None
    device = document_start.device if document_start is not None else state.keys.device
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    # Number 0 is the document that is open when this call begins.
    documents = torch.zeros(1, length, dtype=torch.int64, device=device)
    if document_start is not None:
        documents = document_start.cumsum(dim=1)
    mask = causal & (documents[:, :, None] == documents[:, None, :])
    if state is not None:
        cached = state.keys.shape[1]
        open_document = torch.arange(cached, device=device)[None] >= cached - state.position[:, None]
        seen = open_document[:, None, :] & (documents == 0)[:, :, None]
        mask = torch.cat([seen, mask.expand(seen.shape[0], -1, -1)], dim=2)
    return mask[:, None]


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotary embedding of x [B, S, heads, DH] at `position` [B, S], feature j paired with j + DH / 2, in x's dtype.

    Angles and products are float32 at least (arXiv 2104.09864, equation 34).
    """
    dtype = compute_dtype(x)
    half = x.shape[-1] // 2
    with autocast_disabled(x):
        exponent = torch.arange(half, device=x.device, dtype=dtype) / half
        angle = (position[..., None].to(dtype) * theta**-exponent)[:, :, None]
        cosine, sine = angle.cos(), angle.sin()
        first, second = x.to(dtype).chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)

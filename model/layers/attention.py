"""Causal multi-head attention with rotary positions: the mixer of the Llama baselines and of hybrids.

Axes: B batch, S sequence, D model width, T cached tokens, NH query heads, NKV key/value heads, DH head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.precision import autocast_disabled, compute_dtype
from model.hardware import Hardware
from model.initial_values import reads_stream, writes_stream
from model.layers import base
from model.layers.base import CellForm, LayerKind, Parameter, StateElements, by_heads_problem
from model.problems import Problem, check_heads, check_positive
from model.projections import Linear
from model.sequence import LOCAL, SequenceContext
from model.state import for_decoding

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True)
class AttentionConfig:
    """Causal multi-head attention with rotary positions, as in Llama."""

    # Query heads.
    n_heads: int = 32
    # Key and value heads; fewer than n_heads share them (grouped queries).
    n_kv_heads: int = 32
    # Base of the rotary frequencies.
    rope_theta: float = 500000.0


@dataclass
class AttentionState:
    """A key/value cache. Of its T tokens only the last `position` belong to the document that is still open."""

    # [B, T, NKV, DH] each, keys with their rotary position applied.
    keys: Tensor
    values: Tensor
    # [B] int64: the position of the next token within its document.
    position: Tensor


@dataclass
class AttentionDecodingState:
    """A key/value cache with memory for T tokens, of which each row has the first `position`; steps add where it lies.

    Whoever holds it sees to it that no row gets more than T tokens: then the last ones overwrite each other.
    """

    # [B, T, NKV, DH] each, keys with their rotary position applied.
    keys: Tensor
    values: Tensor
    # [B] int64: the position of the next token within its document.
    position: Tensor

    @classmethod
    def of(cls, state: AttentionState, room: int) -> AttentionDecodingState:
        """A copy of `state`, which has at most `room` tokens in each row's open document, with T = room."""
        cached = state.keys.shape[1]
        index = torch.arange(room, device=state.keys.device)
        held = index < state.position[:, None]
        source = (cached - state.position[:, None] + index).clamp(0, cached - 1)
        keys, values = (_picked(cache, source).masked_fill(~held[..., None, None], 0) for cache in _caches(state))
        return cls(keys, values, state.position.clone())

    def with_room(self, room: int) -> AttentionDecodingState:
        """A copy with memory for `room` tokens, not fewer than the longest row has."""
        kept = min(room, self.keys.shape[1])
        keys, values = (cache.new_zeros(cache.shape[0], room, *cache.shape[2:]) for cache in _caches(self))
        keys[:, :kept], values[:, :kept] = self.keys[:, :kept], self.values[:, :kept]
        return AttentionDecodingState(keys, values, self.position.clone())

    def as_attention_state(self) -> AttentionState:
        """The same tokens in the form that stretches of several continue, in memory of their own."""
        longest = int(self.position.max())
        index = torch.arange(longest, device=self.keys.device)
        source = (index - longest + self.position[:, None]).clamp(min=0)
        keys, values = (_picked(cache, source) for cache in _caches(self))
        return AttentionState(keys, values, self.position.clone())

    def add(self, key: Tensor, value: Tensor) -> Tensor:
        """Put key and value [B, NKV, DH] behind those of each row; [B, 1, 1, T] bool, True at all that it now has."""
        rows, room = self.keys.shape[:2]
        # Rows that nobody reads may go on past their end.
        last = self.position.clamp(max=room - 1)
        every_row = torch.arange(rows, device=last.device)
        self.keys[every_row, last] = key.to(self.keys.dtype)
        self.values[every_row, last] = value.to(self.values.dtype)
        self.position += 1
        return (torch.arange(room, device=last.device) <= last[:, None])[:, None, None]


def _caches(state: AttentionState | AttentionDecodingState) -> tuple[Tensor, Tensor]:
    return state.keys, state.values


def _picked(cache: Tensor, source: Tensor) -> Tensor:
    """Of each row of cache [B, T, NKV, DH] the tokens source [B, N] -> [B, N, NKV, DH]."""
    return cache.gather(1, source[..., None, None].expand(-1, -1, *cache.shape[2:]))


@for_decoding.register
def _(state: AttentionState, room: int | None = None) -> AttentionState | AttentionDecodingState:
    return state if room is None else AttentionDecodingState.of(state, room)


@for_decoding.register
def _(state: AttentionDecodingState, room: int | None = None) -> AttentionDecodingState:
    return state if room is None else state.with_room(room)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(DH)) v within each document, positions counted from the document's start.

    Llama 2 (arXiv 2307.09288) with rotary positions (arXiv 2104.09864); the baseline of arXiv 2510.02228.
    """

    def __init__(self, d_model: int, settings: AttentionConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads = settings.n_heads, settings.n_kv_heads
        self.head_dim = d_model // settings.n_heads
        self.rope_theta = settings.rope_theta
        self.q_proj = Linear(d_model, self.n_heads * self.head_dim)
        self.k_proj = Linear(d_model, self.n_kv_heads * self.head_dim)
        self.v_proj = Linear(d_model, self.n_kv_heads * self.head_dim)
        self.out_proj = Linear(self.n_heads * self.head_dim, d_model)

    def forward(
        self,
        x: Tensor,
        document_start: Tensor | None,
        state: AttentionState | AttentionDecodingState | None,
        return_state: bool,
        sequence: SequenceContext = LOCAL,
    ) -> tuple[Tensor, AttentionState | AttentionDecodingState | None]:
        """x [B, S, D], document_start [B, S] bool or None -> y [B, S, D] and the grown cache, if asked for."""
        q = sequence.time_to_heads(self.q_proj(x).unflatten(-1, (self.n_heads, self.head_dim)))
        k = sequence.time_to_heads(self.k_proj(x).unflatten(-1, (self.n_kv_heads, self.head_dim)))
        v = sequence.time_to_heads(self.v_proj(x).unflatten(-1, (self.n_kv_heads, self.head_dim)))
        document_start = sequence.whole_time(document_start)
        if isinstance(state, AttentionDecodingState):
            if x.shape[1] == 1 and document_start is None and not torch.is_grad_enabled():
                return self._step(q, k, v, state), state
            state = state.as_attention_state()
        position = document_positions(q, document_start, state)
        q, k = rotate(q, position, self.rope_theta), rotate(k, position, self.rope_theta)
        mask = attention_mask(q.shape[1], document_start, state)
        if state is not None:
            k = torch.cat([state.keys.to(k.dtype), k], dim=1)
            v = torch.cat([state.values.to(v.dtype), v], dim=1)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=k.shape[2] != q.shape[2],
        )
        new_state = None
        if return_state:
            new_state = AttentionState(k, v, (position[:, -1] + 1).expand(x.shape[0]))
        return self.out_proj(sequence.heads_to_time(y.transpose(1, 2)).flatten(-2)), new_state

    def _step(self, q: Tensor, k: Tensor, v: Tensor, state: AttentionDecodingState) -> Tensor:
        """One token of each row, q [B, 1, NH, DH], k and v [B, 1, NKV, DH] -> y [B, 1, D]; `state` has it then."""
        position = state.position[:, None]
        q, k = rotate(q, position, self.rope_theta), rotate(k, position, self.rope_theta)
        mask = state.add(k[:, 0], v[:, 0])
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            state.keys.to(q.dtype).transpose(1, 2),
            state.values.to(q.dtype).transpose(1, 2),
            attn_mask=mask,
            enable_gqa=k.shape[2] != q.shape[2],
        )
        projected: Tensor = self.out_proj(y.transpose(1, 2).flatten(-2))
        return projected


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
    given = document_start if state is None else state.keys
    assert given is not None
    device = given.device
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


class AttentionKind(LayerKind):
    name = "attention"
    block = "attention"
    families = ("xlstm_7b",)
    family_reason = "need the feed-forward layer of the 7B kind"
    settings_class = AttentionConfig
    speed_settings = ()

    def validate(self, config: ModelConfig, problem: Problem) -> None:
        attention: AttentionConfig = self.settings(config)
        heads, kv_heads = attention.n_heads, attention.n_kv_heads
        check_positive(problem, "rope_theta", attention.rope_theta)
        if not check_heads(problem, heads, config.d_model, "d_model"):
            return
        head_dim = config.d_model // heads
        if head_dim % 2:
            problem(
                "n_heads",
                f"{heads} heads of d_model {config.d_model} are {head_dim} wide, and rotary positions need an even "
                "head width; choose another number of heads",
            )
        if kv_heads < 1 or heads % kv_heads:
            problem("n_kv_heads", f"{kv_heads} do not divide n_heads {heads}; choose a divisor")

    def module(self, config: ModelConfig, statistics_name: str) -> Attention:
        return Attention(config.d_model, self.settings(config))

    def parameters(self, config: ModelConfig, block_index: int) -> dict[str, Parameter]:
        d_model, kv_width = config.d_model, self._kv_width(config)
        reads, writes = reads_stream(config), writes_stream(config)
        return {
            "q_proj.weight": Parameter((d_model, d_model), base.QUERY_AND_KEY, reads, base.PROJECTIONS),
            "k_proj.weight": Parameter((kv_width, d_model), base.QUERY_AND_KEY, reads, base.PROJECTIONS),
            "v_proj.weight": Parameter((kv_width, d_model), base.VALUE_AND_OUTPUT, reads, base.PROJECTIONS),
            "out_proj.weight": Parameter((d_model, d_model), base.VALUE_AND_OUTPUT, writes, base.PROJECTIONS),
        }

    def forward_flops(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> dict[str, float]:
        # Scores and values: half of 2 S^2 each; softmax: half of 5 S^2 per head.
        per_pair = 2.0 * config.d_model + 2.5 * self.settings(config).n_heads
        return {"attention": sequence_length**2 * per_pair}

    def decoding_flops(self, config: ModelConfig, context: int) -> float:
        return (context + 1) * (4.0 * config.d_model + 5.0 * self.settings(config).n_heads)

    def activation_bytes(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> float:
        c, heads = hardware.compute_bytes, self.settings(config).n_heads
        mask = c * sequence_length
        return c * (4 * config.d_model + 2 * self._kv_width(config)) + 8 * config.d_model / heads + mask

    def cell(self, config: ModelConfig) -> CellForm:
        heads = self.settings(config).n_heads
        return CellForm("attention", heads, config.d_model // heads, config.d_model // heads)

    def state_elements(self, config: ModelConfig) -> StateElements:
        return StateElements(cache_per_token=2 * self._kv_width(config))

    def sequence_problem(self, config: ModelConfig, ranks: int) -> str | None:
        attention: AttentionConfig = self.settings(config)
        problem = by_heads_problem("model.attention.n_heads", attention.n_heads, ranks)
        # Fewer heads of keys and values than ranks are shared by several.
        if problem is None and ranks % attention.n_kv_heads:
            problem = by_heads_problem("model.attention.n_kv_heads", attention.n_kv_heads, ranks)
        return problem

    def _kv_width(self, config: ModelConfig) -> int:
        attention: AttentionConfig = self.settings(config)
        return attention.n_kv_heads * (config.d_model // attention.n_heads)


KIND = AttentionKind()

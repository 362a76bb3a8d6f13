"""Causal multi-head attention: the mixer of the Llama baselines, and of hybrids in a window or without positions.

Axes: B batch, S sequence, D model width, T cached tokens, NH query heads, NKV key/value heads, DH head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import SINK_FEATURES, attention, keys_per_query, masked_attention
from kernels.precision import autocast_disabled, compute_dtype
from model.hardware import Hardware
from model.initial_values import constant, reads_stream, writes_stream
from model.layers import base
from model.layers.base import CellForm, LayerKind, Parameter, StateElements, by_heads_problem
from model.problems import LARGEST_WIDTH, Problem, check_choice, check_heads, check_positive, check_size
from model.projections import Linear
from model.sequence import LOCAL, SequenceContext
from model.state import for_decoding

if TYPE_CHECKING:
    from model.config import ModelConfig


# How tokens know their places.
POSITIONS = ("rotary", "none")


@dataclass(frozen=True)
class AttentionConfig:
    """Causal multi-head attention with rotary positions, as in Llama; or in a window, without positions, with sinks."""

    # Query heads.
    n_heads: int = 32
    # Key and value heads; fewer than n_heads share them (grouped queries).
    n_kv_heads: int = 32
    # "rotary", or "none": nothing but the causal order tells where a token stands (NoPE, arXiv 2305.19466).
    positions: str = "rotary"
    # Base of the rotary frequencies.
    rope_theta: float = 500000.0
    # Tokens that a query sees, itself included; null: all of its document. Decoding keeps no more of them.
    window: int | None = None
    # A learned number per head in the softmax's denominator lets it attend to nothing (arXiv 2508.10925).
    sinks: bool = False


class HasPosition(Protocol):
    """A state that knows where in its document each sequence is."""

    # [B] int64: the position of the next token within its document.
    position: Tensor


@dataclass
class AttentionState:
    """A key/value cache. Of its T tokens only the last `position` belong to the document that is still open."""

    # [B, T, NKV, DH] each, keys with their rotary position applied.
    keys: Tensor
    values: Tensor
    # [B] int64: the position of the next token within its document.
    position: Tensor


@dataclass
class WindowState(AttentionState):
    """Of a window W: T is W - 1 however long the text is, with zeros in front of the first tokens."""


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
        """Put key and value [B, NKV, DH] behind those of each row; [B, 1, T] bool, True at all that it now has."""
        rows, room = self.keys.shape[:2]
        # Rows that nobody reads may go on past their end.
        last = self.position.clamp(max=room - 1)
        every_row = torch.arange(rows, device=last.device)
        self.keys[every_row, last] = key.to(self.keys.dtype)
        self.values[every_row, last] = value.to(self.values.dtype)
        self.position += 1
        return (torch.arange(room, device=last.device) <= last[:, None])[:, None]


def _caches(state: AttentionState | AttentionDecodingState) -> tuple[Tensor, Tensor]:
    return state.keys, state.values


def _picked(cache: Tensor, source: Tensor) -> Tensor:
    """Of each row of cache [B, T, NKV, DH] the tokens source [B, N] -> [B, N, NKV, DH]."""
    return cache.gather(1, source[..., None, None].expand(-1, -1, *cache.shape[2:]))


@for_decoding.register
def _(state: AttentionState, room: int | None = None) -> AttentionState | AttentionDecodingState:
    return state if room is None else AttentionDecodingState.of(state, room)


@for_decoding.register
def _(state: WindowState, room: int | None = None) -> WindowState:
    return state


@for_decoding.register
def _(state: AttentionDecodingState, room: int | None = None) -> AttentionDecodingState:
    return state if room is None else state.with_room(room)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(DH)) v within each document, positions counted from the document's start.

    Llama 2 (arXiv 2307.09288) with rotary positions (arXiv 2104.09864); the baseline of arXiv 2510.02228. The window
    is that of arXiv 2004.05150 and 2310.06825; kernels.attention has the sinks.
    """

    def __init__(self, d_model: int, settings: AttentionConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads = settings.n_heads, settings.n_kv_heads
        self.head_dim = d_model // settings.n_heads
        self.rope_theta = settings.rope_theta if settings.positions == "rotary" else None
        self.window = settings.window
        self.q_proj = Linear(d_model, self.n_heads * self.head_dim)
        self.k_proj = Linear(d_model, self.n_kv_heads * self.head_dim)
        self.v_proj = Linear(d_model, self.n_kv_heads * self.head_dim)
        self.sinks = nn.Parameter(torch.empty(self.n_heads)) if settings.sinks else None
        self.out_proj: nn.Module = Linear(self.n_heads * self.head_dim, d_model)

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
        if self.rope_theta is not None:
            q, k = rotate(q, position, self.rope_theta), rotate(k, position, self.rope_theta)
        if state is not None:
            k = torch.cat([state.keys.to(k.dtype), k], dim=1)
            v = torch.cat([state.values.to(v.dtype), v], dim=1)
        y = attention(
            q,
            k,
            v,
            document_start=document_start,
            carried=None if state is None else state.position,
            window=self.window,
            sinks=None if self.sinks is None else sequence.own_heads(self.sinks),
        )
        new_state: AttentionState | None = None
        if return_state:
            next_position = (position[:, -1] + 1).expand(x.shape[0])
            if self.window is None:
                new_state = AttentionState(k, v, next_position)
            else:
                kept = self.window - 1
                new_state = WindowState(last_tokens(k, kept), last_tokens(v, kept), next_position)
        out: Tensor = self.out_proj(sequence.heads_to_time(y).flatten(-2))
        return out, new_state

    def _step(self, q: Tensor, k: Tensor, v: Tensor, state: AttentionDecodingState) -> Tensor:
        """One token of each row, q [B, 1, NH, DH], k and v [B, 1, NKV, DH] -> y [B, 1, D]; `state` has it then."""
        if self.rope_theta is not None:
            position = state.position[:, None]
            q, k = rotate(q, position, self.rope_theta), rotate(k, position, self.rope_theta)
        mask = state.add(k[:, 0], v[:, 0])
        y = masked_attention(q, state.keys.to(q.dtype), state.values.to(q.dtype), mask, self.sinks)
        projected: Tensor = self.out_proj(y.flatten(-2))
        return projected


def last_tokens(x: Tensor, tokens: int) -> Tensor:
    """The last `tokens` of x [B, S, NKV, DH], with zeros in front where x has fewer."""
    missing = tokens - x.shape[1]
    return F.pad(x, (0, 0, 0, 0, missing, 0)) if missing > 0 else x[:, -missing:]


def document_positions(x: Tensor, document_start: Tensor | None, state: HasPosition | None) -> Tensor:
    """The position of each token of x [B, S, ...] in its document: [B, S] int64, or [1, S] where all rows agree."""
    index = torch.arange(x.shape[1], device=x.device)[None]
    continued = index if state is None else index + state.position[:, None]
    if document_start is None:
        return continued
    last_start = index.masked_fill(~document_start, -1).cummax(dim=1).values
    return torch.where(last_start >= 0, index - last_start, continued)


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
        check_choice(problem, "positions", attention.positions, POSITIONS)
        check_positive(problem, "rope_theta", attention.rope_theta)
        if attention.window is not None:
            check_size(problem, "window", attention.window, LARGEST_WIDTH)
        if not check_heads(problem, heads, config.d_model, "d_model"):
            return
        head_dim = config.d_model // heads
        if head_dim % 2 and attention.positions == "rotary":
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
        heads = (self.settings(config).n_heads,)
        sinks = {"sinks": Parameter(heads, base.SINKS, constant(0.0))} if self.settings(config).sinks else {}
        # A module's own parameters come before those of its parts.
        return sinks | {
            "q_proj.weight": Parameter((d_model, d_model), base.QUERY_AND_KEY, reads, base.PROJECTIONS),
            "k_proj.weight": Parameter((kv_width, d_model), base.QUERY_AND_KEY, reads, base.PROJECTIONS),
            "v_proj.weight": Parameter((kv_width, d_model), base.VALUE_AND_OUTPUT, reads, base.PROJECTIONS),
            "out_proj.weight": Parameter((d_model, d_model), base.VALUE_AND_OUTPUT, writes, base.PROJECTIONS),
        }

    def forward_flops(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> dict[str, float]:
        # Scores and values 4 DH and softmax 5 FLOPs a head and pair: half of S^2 pairs, less those out of the window.
        settings: AttentionConfig = self.settings(config)
        unseen = 0 if settings.window is None else max(0, sequence_length - settings.window)
        pairs = (sequence_length**2 - unseen**2) / 2
        return {"attention": pairs * (4.0 * config.d_model + 5.0 * settings.n_heads)}

    def decoding_flops(self, config: ModelConfig, context: int) -> float:
        settings: AttentionConfig = self.settings(config)
        seen = context + 1 if settings.window is None else min(context + 1, settings.window)
        return seen * (4.0 * config.d_model + 5.0 * settings.n_heads)

    def activation_bytes(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> float:
        c, settings = hardware.compute_bytes, self.settings(config)
        keys, kv_width = keys_per_query(sequence_length, settings.window), self._kv_width(config)
        kept = c * (4 * config.d_model + 2 * kv_width + keys) + 8 * config.d_model / settings.n_heads
        in_blocks = settings.window is not None and settings.window < sequence_length
        if in_blocks:
            # Blocks of queries have the keys and values of their window each, every token's twice.
            kept += c * 2 * kv_width
        if settings.sinks:
            # Heads are wider inside, and their outputs are copied out.
            heads = 2 * settings.n_heads + 2 * settings.n_kv_heads * (2 if in_blocks else 1)
            kept += c * (SINK_FEATURES * heads + config.d_model)
        return kept

    def cell(self, config: ModelConfig) -> CellForm:
        settings: AttentionConfig = self.settings(config)
        width = config.d_model // settings.n_heads
        return CellForm("attention", settings.n_heads, width, width, settings.window)

    def state_elements(self, config: ModelConfig) -> StateElements:
        window, of_token = self.settings(config).window, 2 * self._kv_width(config)
        if window is None:
            return StateElements(cache_per_token=of_token)
        return StateElements(window=(window - 1) * of_token)

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

"""Multi-scale retention (RetNet, arXiv 2307.08621): a fixed decay of each head, and rotary positions.

Axes: B batch, S sequence, D model width, NH heads, DK key and DV value dimension of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear_recurrence import RecurrenceInputs, linear_recurrence
from kernels.precision import compute_dtype
from model.hardware import Hardware
from model.initial_values import constant, writes_stream
from model.layers import base
from model.layers.attention import document_positions, rotate
from model.layers.base import Parameter
from model.layers.linear_recurrence import (
    HeadNormedKind,
    Heads,
    check_backend,
    check_factored_heads,
    factored_heads,
    projection,
)
from model.norms import HeadNorm
from model.problems import Problem, check_positive
from model.projections import Linear
from model.sequence import LOCAL, SequenceContext

if TYPE_CHECKING:
    from model.config import ModelConfig

# A head h keeps the share 1 - 2^(-5 - h) of its memory at each token (equation 8).
_FIRST_EXPONENT = 5


@dataclass(frozen=True)
class RetNetConfig:
    """Multi-scale retention (arXiv 2307.08621 §2)."""

    # Heads, each with a memory and a fixed decay of its own.
    n_heads: int = 4
    # Total query and key width as a share of d_model.
    qk_dim_factor: float = 1.0
    # Total value width as a share of d_model.
    v_dim_factor: float = 2.0
    # Base of the rotary frequencies.
    rope_theta: float = 10000.0
    # Epsilon of the per-head LayerNorm.
    head_norm_eps: float = 1e-5
    # What computes the recurrence: auto, reference or fla (docs/model.md).
    backend: str = "auto"


@dataclass
class RetNetState:
    """The memory, and where in its document each sequence is."""

    # [B, NH, DK, DV], float32 at least.
    memory: Tensor
    # [B] int64: the position of the next token within its document.
    position: Tensor


class RetNet(nn.Module):
    """y = W_o (silu(W_g x) * LayerNorm_h(retention of rotated queries and keys)) (equations 5 to 8)."""

    def __init__(self, d_model: int, settings: RetNetConfig, heads: Heads):
        super().__init__()
        self.settings, self.heads = settings, heads
        self.q_proj = Linear(d_model, heads.key_width)
        self.k_proj = Linear(d_model, heads.key_width)
        self.v_proj = Linear(d_model, heads.value_width)
        self.output_gate = Linear(d_model, heads.value_width)
        self.head_norm = HeadNorm(heads.value_width, settings.head_norm_eps, "auto")
        self.out_proj = Linear(heads.value_width, d_model)

    def forward(
        self,
        x: Tensor,
        document_start: Tensor | None,
        state: RetNetState | None,
        return_state: bool,
        sequence: SequenceContext = LOCAL,
    ) -> tuple[Tensor, RetNetState | None]:
        """x [B, S, D], document_start [B, S] bool or None -> y [B, S, D] and the state behind x, if asked for."""
        by_head = (self.heads.count, -1)
        q, k, v = (project(x).unflatten(-1, by_head) for project in (self.q_proj, self.k_proj, self.v_proj))
        position = document_positions(x, document_start, state)
        q, k = rotate(q, position, self.settings.rope_theta), rotate(k, position, self.settings.rope_theta)
        h, memory = linear_recurrence(
            RecurrenceInputs(
                q, k, v, log_decays(self.heads.count, v).expand(*v.shape[:3]), scale=self.heads.key_dim**-0.5
            ),
            document_start=document_start,
            initial_state=None if state is None else state.memory,
            return_state=return_state,
            backend=self.settings.backend,
        )
        y: Tensor = self.out_proj(F.silu(self.output_gate(x)) * self.head_norm(h))
        if memory is None:
            return y, None
        return y, RetNetState(memory, (position[:, -1] + 1).expand(x.shape[0]))


def log_decays(heads: int, like: Tensor) -> Tensor:
    """[NH], float32 at least, on the device of `like`."""
    exponent = torch.arange(heads, device=like.device, dtype=compute_dtype(like)) + _FIRST_EXPONENT
    return torch.log1p(-(2.0**-exponent))


class RetNetKind(HeadNormedKind):
    name = "retnet"
    block = "retnet"
    settings_class = RetNetConfig

    def heads(self, config: ModelConfig) -> Heads:
        return factored_heads(self.settings(config), config.d_model)

    def validate(self, config: ModelConfig, problem: Problem) -> None:
        settings: RetNetConfig = self.settings(config)
        check_factored_heads(problem, settings, config.d_model)
        if settings.n_heads > 0 and settings.qk_dim_factor > 0 and self.heads(config).key_dim % 2:
            problem("n_heads", "rotary positions need an even width of keys; choose another number of heads")
        for key in ("rope_theta", "head_norm_eps"):
            check_positive(problem, key, getattr(settings, key))
        check_backend(problem, settings.backend)

    def module(self, config: ModelConfig, statistics_name: str) -> RetNet:
        return RetNet(config.d_model, self.settings(config), self.heads(config))

    def parameters(self, config: ModelConfig, block_index: int) -> dict[str, Parameter]:
        heads, d_model = self.heads(config), config.d_model

        return {
            "q_proj.weight": projection(config, heads.key_width, base.QUERY_AND_KEY),
            "k_proj.weight": projection(config, heads.key_width, base.QUERY_AND_KEY),
            "v_proj.weight": projection(config, heads.value_width, base.VALUE_AND_OUTPUT),
            "output_gate.weight": projection(config, heads.value_width, base.VALUE_AND_OUTPUT),
            "head_norm.weight": Parameter((heads.value_width,), base.NORMS, constant(1.0)),
            "out_proj.weight": Parameter(
                (d_model, heads.value_width), base.VALUE_AND_OUTPUT, writes_stream(config), base.PROJECTIONS
            ),
        }

    def activation_bytes(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> float:
        heads, c = self.heads(config), hardware.compute_bytes
        # As gated linear attention without its map of decays, and cosines and sines in float32.
        around = c * (2 * config.d_model + 5 * heads.value_width) + 8 * heads.key_dim
        return around + self.norm_bytes(config, hardware) + self.recurrence_bytes(config, hardware)


KIND = RetNetKind()

"""Gated linear attention (arXiv 2312.06635): a decay of each key feature that depends on the token.

Axes: B batch, S sequence, D model width, NH heads, DK key and DV value dimension of a head, R rank of the decays' map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear_recurrence import RecurrenceInputs, linear_recurrence
from kernels.precision import autocast_disabled, compute_dtype
from model.hardware import Hardware
from model.initial_values import constant, reads_stream, writes_stream
from model.layers import base
from model.layers.base import Parameter
from model.layers.linear_recurrence import (
    DECAYS,
    HeadNormedKind,
    Heads,
    RecurrentState,
    check_backend,
    check_factored_heads,
    factored_heads,
    projection,
)
from model.norms import HeadNorm
from model.problems import LARGEST_WIDTH, Problem, check_positive, check_size
from model.projections import Linear
from model.sequence import LOCAL, SequenceContext

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True)
class GLAConfig:
    """Gated linear attention (arXiv 2312.06635 §4.4)."""

    # Heads, each with a memory of its own.
    n_heads: int = 4
    # Total query and key width as a share of d_model.
    qk_dim_factor: float = 0.5
    # Total value width as a share of d_model.
    v_dim_factor: float = 1.0
    # Rank of the map that gives the decays.
    decay_rank: int = 16
    # The sigmoid that gives a decay is raised to 1 over this: decays begin near 1.
    decay_temperature: float = 16.0
    # Epsilon of the per-head LayerNorm.
    head_norm_eps: float = 1e-5
    # What computes the recurrence: auto, reference or fla (docs/model.md).
    backend: str = "auto"


class GLA(nn.Module):
    """y = W_o (silu(W_g x) * LayerNorm_h(recurrence)), decays sigmoid(W_2 W_1 x + b)^(1 / 16)."""

    def __init__(self, d_model: int, settings: GLAConfig, heads: Heads):
        super().__init__()
        self.settings, self.heads = settings, heads
        self.q_proj = Linear(d_model, heads.key_width)
        self.k_proj = Linear(d_model, heads.key_width)
        self.v_proj = Linear(d_model, heads.value_width)
        self.decay_down = Linear(d_model, settings.decay_rank)
        self.decay_up = nn.Parameter(torch.empty(heads.key_width, settings.decay_rank))
        self.decay_bias = nn.Parameter(torch.empty(heads.key_width))
        self.output_gate = Linear(d_model, heads.value_width)
        self.head_norm = HeadNorm(heads.value_width, settings.head_norm_eps, "auto")
        self.out_proj = Linear(heads.value_width, d_model)

    def forward(
        self,
        x: Tensor,
        document_start: Tensor | None,
        state: RecurrentState | None,
        return_state: bool,
        sequence: SequenceContext = LOCAL,
    ) -> tuple[Tensor, RecurrentState | None]:
        """x [B, S, D], document_start [B, S] bool or None -> y [B, S, D] and the state behind x, if asked for."""
        by_head = (self.heads.count, -1)
        q, k, v = (project(x).unflatten(-1, by_head) for project in (self.q_proj, self.k_proj, self.v_proj))
        h, memory = linear_recurrence(
            RecurrenceInputs(q, k, v, self.log_decay(x).unflatten(-1, by_head), scale=self.heads.key_dim**-0.5),
            document_start=document_start,
            initial_state=None if state is None else state.memory,
            return_state=return_state,
            backend=self.settings.backend,
        )
        y: Tensor = self.out_proj(F.silu(self.output_gate(x)) * self.head_norm(h))
        return y, None if memory is None else RecurrentState(memory)

    def log_decay(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, NH DK], float32 at least."""
        low = self.decay_down(x)
        dtype = compute_dtype(low, self.decay_up)
        with autocast_disabled(x):
            preact = F.linear(low.to(dtype), self.decay_up.to(dtype), self.decay_bias.to(dtype))
            return F.logsigmoid(preact) / self.settings.decay_temperature


class GLAKind(HeadNormedKind):
    name = "gla"
    block = "gla"
    settings_class = GLAConfig

    def heads(self, config: ModelConfig) -> Heads:
        return factored_heads(self.settings(config), config.d_model, per_feature=True)

    def validate(self, config: ModelConfig, problem: Problem) -> None:
        settings: GLAConfig = self.settings(config)
        check_factored_heads(problem, settings, config.d_model)
        check_size(problem, "decay_rank", settings.decay_rank, LARGEST_WIDTH)
        check_positive(problem, "decay_temperature", settings.decay_temperature)
        check_positive(problem, "head_norm_eps", settings.head_norm_eps)
        check_backend(problem, settings.backend)

    def module(self, config: ModelConfig, statistics_name: str) -> GLA:
        return GLA(config.d_model, self.settings(config), self.heads(config))

    def parameters(self, config: ModelConfig, block_index: int) -> dict[str, Parameter]:
        heads, d_model, rank = self.heads(config), config.d_model, self.settings(config).decay_rank
        reads = reads_stream(config)

        return {
            "decay_up": Parameter((heads.key_width, rank), DECAYS, reads, base.PROJECTIONS),
            "decay_bias": Parameter((heads.key_width,), DECAYS, constant(0.0)),
            "q_proj.weight": projection(config, heads.key_width, base.QUERY_AND_KEY),
            "k_proj.weight": projection(config, heads.key_width, base.QUERY_AND_KEY),
            "v_proj.weight": projection(config, heads.value_width, base.VALUE_AND_OUTPUT),
            "decay_down.weight": projection(config, rank, DECAYS),
            "output_gate.weight": projection(config, heads.value_width, base.VALUE_AND_OUTPUT),
            "head_norm.weight": Parameter((heads.value_width,), base.NORMS, constant(1.0)),
            "out_proj.weight": Parameter(
                (d_model, heads.value_width), base.VALUE_AND_OUTPUT, writes_stream(config), base.PROJECTIONS
            ),
        }

    def activation_bytes(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> float:
        heads, c, settings = self.heads(config), hardware.compute_bytes, self.settings(config)
        # x and its norm; the recurrence's output, the gate before and behind its silu, the head norm's output, the
        # output projection's input; the decays' map and its results in float32.
        around = c * (2 * config.d_model + 5 * heads.value_width + settings.decay_rank) + 4 * heads.key_width
        return around + self.norm_bytes(config, hardware) + self.recurrence_bytes(config, hardware)


KIND = GLAKind()

"""Gated DeltaNet (arXiv 2412.06464): linear attention that replaces what a key read before, and decays.

Axes: B batch, S sequence, D model width, NH heads, DK key and DV value dimension of a head.
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
from model.initial_values import constant, uniform, writes_stream
from model.layers import base
from model.layers.base import Parameter, StateElements
from model.layers.linear_recurrence import (
    DECAYS,
    ConvRecurrentState,
    Heads,
    LinearRecurrenceKind,
    RMSHeadNorm,
    check_backend,
    check_factored_heads,
    check_taps,
    factored_heads,
    log_rates,
    projection,
    step_sizes,
)
from model.problems import Problem, check_positive
from model.projections import CausalConv, Linear
from model.sequence import LOCAL, SequenceContext

if TYPE_CHECKING:
    from model.config import ModelConfig

# Under the root of the length by which queries and keys are divided.
_LENGTH_EPS = 1e-6


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    """Gated DeltaNet (arXiv 2412.06464 §3.4)."""

    # Heads, each with a memory of its own.
    n_heads: int = 6
    # Total query and key width as a share of d_model.
    qk_dim_factor: float = 0.75
    # Total value width as a share of d_model.
    v_dim_factor: float = 1.5
    # Tokens that the causal convolution sees.
    conv_kernel_size: int = 4
    # Epsilon of the RMSNorm of each head.
    norm_eps: float = 1e-5
    # What computes the recurrence: auto, reference or fla (docs/model.md).
    backend: str = "auto"


class GatedDeltaNet(nn.Module):
    """y = W_o (silu(W_g x) * RMSNorm_h(recurrence)), queries, keys and values behind a convolution and a silu.

    Queries and keys have length 1. A decay is exp(-rate softplus(W_a x + bias)), the share that is replaced
    sigmoid(W_b x).
    """

    def __init__(self, d_model: int, settings: GatedDeltaNetConfig, heads: Heads):
        super().__init__()
        self.settings, self.heads = settings, heads
        self.log_rate = nn.Parameter(torch.empty(heads.count))
        self.step_bias = nn.Parameter(torch.empty(heads.count))
        self.qkv_proj = Linear(d_model, 2 * heads.key_width + heads.value_width)
        self.conv = CausalConv(2 * heads.key_width + heads.value_width, settings.conv_kernel_size)
        self.step_proj = Linear(d_model, heads.count)
        self.beta_proj = Linear(d_model, heads.count)
        self.output_gate = Linear(d_model, heads.value_width)
        self.norm = RMSHeadNorm(heads.value_dim, settings.norm_eps)
        self.out_proj = Linear(heads.value_width, d_model)

    def forward(
        self,
        x: Tensor,
        document_start: Tensor | None,
        state: ConvRecurrentState | None,
        return_state: bool,
        sequence: SequenceContext = LOCAL,
    ) -> tuple[Tensor, ConvRecurrentState | None]:
        """x [B, S, D], document_start [B, S] bool or None -> y [B, S, D] and the state behind x, if asked for."""
        heads = self.heads
        convolved, tail = self.conv(self.qkv_proj(x), document_start, None if state is None else state.conv_tail)
        parts = F.silu(convolved).split([heads.key_width, heads.key_width, heads.value_width], dim=-1)
        q, k, v = (part.unflatten(-1, (heads.count, -1)) for part in parts)
        h, memory = linear_recurrence(
            RecurrenceInputs(
                of_length_1(q),
                of_length_1(k),
                v,
                self.log_decay(x),
                beta=torch.sigmoid(self.beta_proj(x)),
                scale=heads.key_dim**-0.5,
            ),
            document_start=document_start,
            initial_state=None if state is None else state.memory,
            return_state=return_state,
            backend=self.settings.backend,
        )
        y: Tensor = self.out_proj(F.silu(self.output_gate(x)) * self.norm(h).flatten(-2))
        return y, None if memory is None else ConvRecurrentState(tail, memory)

    def log_decay(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, NH], float32 at least."""
        step = self.step_proj(x)
        dtype = compute_dtype(step, self.step_bias)
        with autocast_disabled(x):
            return -self.log_rate.to(dtype).exp() * F.softplus(step.to(dtype) + self.step_bias.to(dtype))


def of_length_1(x: Tensor) -> Tensor:
    """x [..., DK] divided by its length, which is computed in float32 at least."""
    dtype = compute_dtype(x)
    with autocast_disabled(x):
        wide = x.to(dtype)
        return (wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + _LENGTH_EPS)).to(x.dtype)


class GatedDeltaNetKind(LinearRecurrenceKind):
    name = "gated_deltanet"
    block = "gated_deltanet"
    settings_class = GatedDeltaNetConfig

    def heads(self, config: ModelConfig) -> Heads:
        return factored_heads(self.settings(config), config.d_model, delta_rule=True)

    def validate(self, config: ModelConfig, problem: Problem) -> None:
        settings: GatedDeltaNetConfig = self.settings(config)
        check_factored_heads(problem, settings, config.d_model)
        check_taps(problem, settings.conv_kernel_size)
        check_positive(problem, "norm_eps", settings.norm_eps)
        check_backend(problem, settings.backend)

    def module(self, config: ModelConfig, statistics_name: str) -> GatedDeltaNet:
        return GatedDeltaNet(config.d_model, self.settings(config), self.heads(config))

    def parameters(self, config: ModelConfig, block_index: int) -> dict[str, Parameter]:
        heads, d_model, taps = self.heads(config), config.d_model, self.settings(config).conv_kernel_size
        channels = 2 * heads.key_width + heads.value_width
        # As PyTorch's own convolutions begin.
        near_zero = uniform(taps**-0.5)

        return {
            "log_rate": Parameter((heads.count,), DECAYS, log_rates(1.0, 16.0)),
            "step_bias": Parameter((heads.count,), DECAYS, step_sizes),
            "qkv_proj.weight": projection(config, channels, base.QUERY_AND_KEY),
            "conv.weight": Parameter((channels, 1, taps), base.CONVOLUTION, near_zero, base.CONVOLUTION_FLOPS),
            "conv.bias": Parameter((channels,), base.CONVOLUTION, near_zero),
            "step_proj.weight": projection(config, heads.count, DECAYS),
            "beta_proj.weight": projection(config, heads.count, DECAYS),
            "output_gate.weight": projection(config, heads.value_width, base.VALUE_AND_OUTPUT),
            "norm.weight": Parameter((heads.value_dim,), base.NORMS, constant(1.0)),
            "out_proj.weight": Parameter(
                (d_model, heads.value_width), base.VALUE_AND_OUTPUT, writes_stream(config), base.PROJECTIONS
            ),
        }

    def activation_bytes(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> float:
        heads, c, settings = self.heads(config), hardware.compute_bytes, self.settings(config)
        channels = 2 * heads.key_width + heads.value_width
        # x and its norm; before the convolution, before and behind the silu; keys and queries in float32, whose lengths
        # are taken; the recurrence's output, the gate and its silu, the norm's output, the projection's input.
        around = c * (2 * config.d_model + 2 * channels + 5 * heads.value_width)
        in_float32 = 4 * settings.conv_kernel_size * channels + 16 * heads.key_width + 16 * heads.count
        return around + in_float32 + self.recurrence_bytes(config, hardware)

    def state_elements(self, config: ModelConfig) -> StateElements:
        heads, recurrent = self.heads(config), super().state_elements(config).recurrent
        tail = (self.settings(config).conv_kernel_size - 1) * (2 * heads.key_width + heads.value_width)
        return StateElements(recurrent=recurrent, convolution=tail)


KIND = GatedDeltaNetKind()

"""Mamba-2 (arXiv 2405.21060): a state-space layer as linear attention with one decay of each head.

Keys and queries are what that paper calls B and C, values are inputs times their step size, and a decay is the
exponential of minus a rate times the step size (its section 7).

Axes: B batch, S sequence, D model width, E inner width, NH heads, P inner width of a head, N state width, G groups of
heads that share keys and queries.
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
from model.initial_values import constant, reads_stream, uniform, writes_stream
from model.layers import base
from model.layers.base import Parameter, StateElements
from model.layers.linear_recurrence import (
    DECAYS,
    ConvRecurrentState,
    Heads,
    LinearRecurrenceKind,
    RMSHeadNorm,
    check_backend,
    check_taps,
    log_rates,
    step_sizes,
)
from model.problems import LARGEST_WIDTH, Problem, check_factor, check_positive, check_size
from model.projections import CausalConv, Linear
from model.sequence import LOCAL, SequenceContext

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True)
class Mamba2Config:
    """Mamba-2 (arXiv 2405.21060 §7)."""

    # Inner width as a multiple of d_model.
    expand: float = 2.0
    # Inner width of a head.
    head_dim: int = 64
    # Width of keys and queries, the state width of the paper.
    state_dim: int = 128
    # Groups of heads that share keys and queries.
    n_groups: int = 1
    # Tokens that the causal convolution sees.
    conv_kernel_size: int = 4
    # Epsilon of the RMSNorm in front of the output projection.
    norm_eps: float = 1e-5
    # What computes the recurrence: auto, reference or fla (docs/model.md).
    backend: str = "auto"

    def width(self, d_model: int) -> int:
        """E."""
        return round(d_model * self.expand)

    def conv_channels(self, d_model: int) -> int:
        """Of values, keys and queries."""
        return self.width(d_model) + 2 * self.n_groups * self.state_dim


class Mamba2(nn.Module):
    """out(RMSNorm((recurrence + D x) * silu(z))) with x, keys and queries behind a convolution and a silu."""

    def __init__(self, d_model: int, settings: Mamba2Config, heads: Heads):
        super().__init__()
        self.settings, self.heads = settings, heads
        self.width, channels = settings.width(d_model), settings.conv_channels(d_model)
        self.log_rate = nn.Parameter(torch.empty(heads.count))
        self.step_bias = nn.Parameter(torch.empty(heads.count))
        self.skip = nn.Parameter(torch.empty(heads.count))
        self.in_proj = Linear(d_model, self.width + channels + heads.count)
        self.conv = CausalConv(channels, settings.conv_kernel_size)
        self.norm = RMSHeadNorm(self.width, settings.norm_eps)
        self.out_proj = Linear(self.width, d_model)

    def forward(
        self,
        x: Tensor,
        document_start: Tensor | None,
        state: ConvRecurrentState | None,
        return_state: bool,
        sequence: SequenceContext = LOCAL,
    ) -> tuple[Tensor, ConvRecurrentState | None]:
        """x [B, S, D], document_start [B, S] bool or None -> y [B, S, D] and the state behind x, if asked for."""
        settings, count = self.settings, self.heads.count
        channels = self.width + 2 * settings.n_groups * settings.state_dim
        gate, convolved, step = self.in_proj(x).split([self.width, channels, count], dim=-1)
        convolved, tail = self.conv(convolved, document_start, None if state is None else state.conv_tail)
        keys = settings.n_groups * settings.state_dim
        values, k, q = F.silu(convolved).split([self.width, keys, keys], dim=-1)
        values = values.unflatten(-1, (count, settings.head_dim))
        k, q = (self._for_heads(part) for part in (k, q))
        dtype = compute_dtype(step, self.step_bias)
        with autocast_disabled(x):
            step = F.softplus(step.to(dtype) + self.step_bias.to(dtype))
            log_decay = -self.log_rate.to(dtype).exp() * step
            written = (values.to(dtype) * step[..., None]).to(values.dtype)
        h, memory = linear_recurrence(
            RecurrenceInputs(q, k, written, log_decay),
            document_start=document_start,
            initial_state=None if state is None else state.memory,
            return_state=return_state,
            backend=settings.backend,
        )
        h = h + self.skip.to(values.dtype)[:, None] * values
        y: Tensor = self.out_proj(self.norm(h.flatten(-2) * F.silu(gate)))
        return y, None if memory is None else ConvRecurrentState(tail, memory)

    def _for_heads(self, x: Tensor) -> Tensor:
        """[B, S, G N] -> [B, S, NH, N]: each group's for all of its heads."""
        groups = x.unflatten(-1, (self.settings.n_groups, self.settings.state_dim))
        return groups.repeat_interleave(self.heads.count // self.settings.n_groups, dim=2)


class Mamba2Kind(LinearRecurrenceKind):
    name = "mamba2"
    block = "mamba2"
    has_feed_forward = False
    settings_class = Mamba2Config

    def heads(self, config: ModelConfig) -> Heads:
        settings: Mamba2Config = self.settings(config)
        count = settings.width(config.d_model) // settings.head_dim
        return Heads(count, settings.state_dim, settings.head_dim, backend=settings.backend)

    def validate(self, config: ModelConfig, problem: Problem) -> None:
        settings: Mamba2Config = self.settings(config)
        for key in ("head_dim", "state_dim", "n_groups"):
            check_size(problem, key, getattr(settings, key), LARGEST_WIDTH)
        check_taps(problem, settings.conv_kernel_size)
        check_positive(problem, "norm_eps", settings.norm_eps)
        check_backend(problem, settings.backend)
        if not check_factor(problem, "expand", settings.expand) or min(settings.head_dim, settings.n_groups) < 1:
            return
        width = settings.width(config.d_model)
        if width < 1 or width % settings.head_dim:
            problem(
                "head_dim",
                f"{settings.head_dim} does not divide the inner width {width} (d_model {config.d_model} x expand "
                f"{settings.expand}); choose a divisor",
            )
        elif (width // settings.head_dim) % settings.n_groups:
            problem("n_groups", f"{settings.n_groups} do not divide the {width // settings.head_dim} heads")

    def module(self, config: ModelConfig, statistics_name: str) -> Mamba2:
        return Mamba2(config.d_model, self.settings(config), self.heads(config))

    def parameters(self, config: ModelConfig, block_index: int) -> dict[str, Parameter]:
        settings: Mamba2Config = self.settings(config)
        d_model, heads = config.d_model, (self.heads(config).count,)
        width, channels, taps = settings.width(d_model), settings.conv_channels(d_model), settings.conv_kernel_size
        # As PyTorch's own convolutions begin, which those of Mamba are.
        near_zero = uniform(taps**-0.5)
        rows = width + channels + heads[0]
        return {
            "log_rate": Parameter(heads, DECAYS, log_rates(1.0, 16.0)),
            "step_bias": Parameter(heads, DECAYS, step_sizes),
            "skip": Parameter(heads, base.CONVOLUTION, constant(1.0)),
            "in_proj.weight": Parameter((rows, d_model), base.UP_AND_DOWN, reads_stream(config), base.PROJECTIONS),
            "conv.weight": Parameter((channels, 1, taps), base.CONVOLUTION, near_zero, base.CONVOLUTION_FLOPS),
            "conv.bias": Parameter((channels,), base.CONVOLUTION, near_zero),
            "norm.weight": Parameter((width,), base.NORMS, constant(1.0)),
            "out_proj.weight": Parameter((d_model, width), base.UP_AND_DOWN, writes_stream(config), base.PROJECTIONS),
        }

    def activation_bytes(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> float:
        settings, c, heads = self.settings(config), hardware.compute_bytes, self.heads(config)
        width, channels = settings.width(config.d_model), settings.conv_channels(config.d_model)
        # x and its norm; the gate and its silu; before the convolution, before and behind the silu; values in float32;
        # the recurrence's output with the skip, gated, normed.
        around = c * (2 * config.d_model + 5 * width + channels) + 4 * settings.conv_kernel_size * channels
        in_float32 = (4 + (8 if c < 4 else 4)) * width + 12 * heads.count
        return around + in_float32 + self.recurrence_bytes(config, hardware)

    def state_elements(self, config: ModelConfig) -> StateElements:
        settings, recurrent = self.settings(config), super().state_elements(config).recurrent
        tail = (settings.conv_kernel_size - 1) * settings.conv_channels(config.d_model)
        return StateElements(recurrent=recurrent, convolution=tail)


KIND = Mamba2Kind()

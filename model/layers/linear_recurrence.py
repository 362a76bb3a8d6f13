"""What the layers around kernels.linear_recurrence have in common: GLA, RetNet, Mamba-2 and Gated DeltaNet.

They are there to be compared with: projections that read and write the residual stream begin as those of every other
kind here, what a paper says of its own parameters is kept. A sequence belongs to one rank.

Axes: B batch, S sequence, D model width, NH heads, DK key and DV value dimension of a head.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from kernels.linear_recurrence import BACKENDS
from kernels.precision import autocast_disabled, compute_dtype
from model.hardware import Hardware
from model.initial_values import InitialValue, Shape, empty, reads_stream
from model.layers import base
from model.layers.base import CellForm, KernelUse, LayerKind, Parameter, StateElements
from model.problems import Problem, check_choice, check_factor, check_heads

if TYPE_CHECKING:
    from kernels.preflight import Case
    from model.config import ModelConfig

RECURRENCE_FLOPS = "linear recurrence"
DECAYS = "decays and step sizes"
# Tokens of a chunk of flash-linear-attention.
_CHUNK = 64
# Step sizes that Mamba begins with, and the range of its decay rates (arXiv 2312.00752 §3.6, 2405.21060 §7).
_SMALLEST_STEP, _LARGEST_STEP = 1e-3, 1e-1


@dataclass
class RecurrentState:
    """The memory of a linear recurrence."""

    # [B, NH, DK, DV], float32 at least.
    memory: Tensor


@dataclass
class ConvRecurrentState:
    """The memory of a linear recurrence, and the last inputs of the convolution in front of it."""

    # [B, K - 1, C] in the activations' dtype.
    conv_tail: Tensor
    # [B, NH, DK, DV], float32 at least.
    memory: Tensor


@dataclass(frozen=True)
class Heads:
    """The heads of a recurrence.

    Attributes:
        count, key_dim, value_dim: NH, DK and DV.
        per_feature, delta_rule: its form (kernels.linear_recurrence).
        backend: of kernels.linear_recurrence.
    """

    count: int
    key_dim: int
    value_dim: int
    per_feature: bool = False
    delta_rule: bool = False
    backend: str = "auto"

    @property
    def key_width(self) -> int:
        """All heads together."""
        return self.count * self.key_dim

    @property
    def value_width(self) -> int:
        """All heads together."""
        return self.count * self.value_dim


class FactoredHeads(Protocol):
    """Settings that give the heads by shares of d_model."""

    @property
    def n_heads(self) -> int: ...
    @property
    def qk_dim_factor(self) -> float: ...
    @property
    def v_dim_factor(self) -> float: ...
    @property
    def backend(self) -> str: ...


def factored_heads(
    settings: FactoredHeads, d_model: int, *, per_feature: bool = False, delta_rule: bool = False
) -> Heads:
    """The heads of settings that `check_factored_heads` found right."""
    key_dim, value_dim = (
        round(d_model * factor) // settings.n_heads for factor in (settings.qk_dim_factor, settings.v_dim_factor)
    )
    return Heads(settings.n_heads, key_dim, value_dim, per_feature, delta_rule, settings.backend)


def projection(config: ModelConfig, width: int, group: str) -> Parameter:
    """The weight of a projection of the residual stream to `width`."""
    return Parameter((width, config.d_model), group, reads_stream(config), base.PROJECTIONS)


class LinearRecurrenceKind(LayerKind):
    """A kind whose cell is kernels.linear_recurrence."""

    families = ("xlstm_7b",)
    loops_on_cpu = True

    @abstractmethod
    def heads(self, config: ModelConfig) -> Heads:
        """Of the recurrence."""

    def forward_flops(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> dict[str, float]:
        """The recurrent form, as in decoding; the chunks of a GPU compute more."""
        return {RECURRENCE_FLOPS: sequence_length * self.decoding_flops(config, 0)}

    def decoding_flops(self, config: ModelConfig, context: int) -> float:
        """Decay DK DV, update 2 DK DV, read-out 2 DK DV a head; the delta rule reads once more, and 2 DV."""
        heads = self.heads(config)
        memory = heads.key_dim * heads.value_dim
        delta = 2 * memory + 2 * heads.value_dim if heads.delta_rule else 0
        return float(heads.count * (5 * memory + delta))

    def recurrence_bytes(self, config: ModelConfig, hardware: Hardware) -> float:
        """Bytes per token that the recurrence keeps beside its output, q, k and v included."""
        heads, c = self.heads(config), hardware.compute_bytes
        decays = heads.key_width if heads.per_feature else heads.count
        inputs = 2 * heads.key_width + heads.value_width
        if not self.runs_kernels(config, hardware):
            # In float32: the memory behind each token, also as it decayed with the delta rule, what is multiplied.
            copies = 2 if heads.delta_rule else 1
            memory = 4 * copies * heads.key_width * heads.value_dim
            rule = 4 * (2 * heads.value_width + heads.count) if heads.delta_rule else 0
            return memory + (4 if c == 4 else 4 + c) * inputs + 8 * decays + rule
        of_chunk = 4 * _CHUNK * heads.count if heads.delta_rule else 0
        return c * inputs + 4 * decays + (4 * heads.count if heads.delta_rule else 0) + of_chunk

    def runs_kernels(self, config: ModelConfig, hardware: Hardware) -> bool:
        """Whether flash-linear-attention computes it."""
        backend = self.heads(config).backend
        return backend == "fla" or (backend == "auto" and hardware.runs_kernels("auto"))

    def cell(self, config: ModelConfig) -> CellForm:
        """Calibrations have no linear recurrence; an mLSTM of such heads comes nearest in what it multiplies."""
        heads = self.heads(config)
        return CellForm("mlstm", heads.count, heads.key_dim, heads.value_dim)

    def state_elements(self, config: ModelConfig) -> StateElements:
        heads = self.heads(config)
        return StateElements(recurrent=heads.key_width * heads.value_dim)

    def kernel_cases(self, config: ModelConfig, use: KernelUse) -> list[Case]:
        from kernels.preflight import LinearRecurrenceCase

        heads = self.heads(config)
        shape = (heads.count, heads.key_dim, heads.value_dim, use.dtype)
        return [LinearRecurrenceCase(*shape, heads.per_feature, heads.delta_rule, heads.backend)]


class HeadNormedKind(LinearRecurrenceKind):
    """A kind with a HeadNorm (kernels.head_norm) behind the recurrence, whose epsilon is the setting head_norm_eps."""

    def norm_bytes(self, config: ModelConfig, hardware: Hardware) -> float:
        """Bytes per token that the head norm keeps in float32 where no kernel computes it."""
        return 0.0 if hardware.runs_kernels("auto") else 8.0 * self.heads(config).value_width

    def kernel_cases(self, config: ModelConfig, use: KernelUse) -> list[Case]:
        from kernels.preflight import HeadNormCase

        heads, eps = self.heads(config), self.settings(config).head_norm_eps
        norm = HeadNormCase(heads.count, heads.value_dim, use.dtype, use.weight_dtype, eps, False)
        return [*super().kernel_cases(config, use), norm]


class RMSHeadNorm(nn.Module):
    """RMS normalisation over the last axis with a weight, in float32 at least."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same in x's dtype."""
        dtype = compute_dtype(x, self.weight)
        with autocast_disabled(x):
            return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)


def check_backend(problem: Problem, backend: str) -> None:
    """It must be one of kernels.linear_recurrence."""
    check_choice(problem, "backend", backend, BACKENDS)


def check_taps(problem: Problem, kernel_size: int) -> None:
    """These layers are not without their convolution."""
    if kernel_size < 2:
        problem("conv_kernel_size", f"is {kernel_size}; a convolution needs at least 2 taps")


def check_factored_heads(problem: Problem, settings: FactoredHeads, d_model: int) -> None:
    """There must be heads, and they must divide both widths."""
    if settings.n_heads < 1:
        problem("n_heads", f"is {settings.n_heads}; it must be a positive number")
    for key in ("qk_dim_factor", "v_dim_factor"):
        _check_width(problem, key, getattr(settings, key), settings.n_heads, d_model)


def _check_width(problem: Problem, key: str, factor: float, n_heads: int, d_model: int) -> None:
    """`factor`, the setting `key`, times d_model must be a width that n_heads divide."""
    if not check_factor(problem, key, factor):
        return
    width = round(d_model * factor)
    if not width > 0:
        problem(key, f"{factor} gives a width of {width}; choose a positive factor")
    elif n_heads > 0:
        check_heads(problem, n_heads, width, f"d_model {d_model} x {key} {factor}")


def step_sizes(shape: Shape, generator: Generator) -> Tensor:
    """Biases that a softplus makes step sizes from 0.001 to 0.1 of, evenly in their logarithm (as Mamba begins)."""
    share = empty(shape).uniform_(0, 1, generator=generator)
    low, high = math.log(_SMALLEST_STEP), math.log(_LARGEST_STEP)
    step = torch.exp(low + share * (high - low))
    return step + torch.log(-torch.expm1(-step))


def log_rates(smallest: float, largest: float) -> InitialValue:
    """Logarithms of decay rates that are even from `smallest` to `largest`."""
    return lambda shape, generator: empty(shape).uniform_(smallest, largest, generator=generator).log()

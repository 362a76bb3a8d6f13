"""The sLSTM layer: a recurrence with memory mixing, four gates each of which sees the previous output.

Axes: B batch, S sequence, D model width, NH heads, DH head dimension. Gate slots, in order: input i, forget f, cell
input z, output o.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.backend_choice import BACKENDS
from kernels.precision import autocast_disabled
from kernels.slstm import SLSTMState, slstm
from kernels.slstm.accounting import triton_kept_bytes
from kernels.soft_cap import soft_cap
from model import statistics
from model.hardware import Hardware
from model.initial_values import Shape, constant, empty, reads_stream
from model.layers import base
from model.layers.base import (
    CellForm,
    KernelUse,
    LayerKind,
    Parameter,
    StateElements,
    by_heads_problem,
    convolution_parameters,
)
from model.norms import HeadNorm
from model.problems import Problem, check_choice, check_convolution, check_heads, check_positive, check_soft_cap
from model.projections import BlockDiagonalLinear, CausalConv
from model.sequence import LOCAL, SequenceContext
from model.state import ConvCellState

if TYPE_CHECKING:
    from kernels.preflight import Case
    from model.config import ModelConfig

_FORGET_SLOT = 1
_MEASURED_TOKENS = 256


@dataclass(frozen=True)
class SLSTMConfig:
    """The sLSTM layer (arXiv 2405.04517, figure 10)."""

    # Heads; recurrent weights stay inside of a head.
    n_heads: int = 4
    # Tokens that the causal convolution sees; 0: the gates see the layer's input itself.
    conv_kernel_size: int = 4
    # Epsilon of the per-head norm.
    head_norm_eps: float = 1e-5
    # null in the NeurIPS blocks; the 7B kind caps at 15 as its mLSTM does.
    gate_soft_cap: float | None = None
    # What computes the cell: auto, reference or triton (docs/kernels.md).
    backend: str = "auto"


class SLSTM(nn.Module):
    """The sLSTM layer of arXiv 2405.04517, figure 10: head_norm(cell(W_i a, W_f a, W_z x, W_o x)), a = SiLU(conv(x)).

    Without a convolution, which the figure calls optional, a = x: state tracking trains that way (appendix B.1).
    The input and forget gates (and the whole cell) compute in float32 at least, whatever the dtype of the model.
    """

    def __init__(self, d_model: int, settings: SLSTMConfig, statistics_name: str):
        super().__init__()
        self.settings = settings
        self.statistics_name = statistics_name
        heads = settings.n_heads
        head_dim = d_model // heads
        self.conv = CausalConv(d_model, settings.conv_kernel_size) if settings.conv_kernel_size else None
        self.igate_proj = BlockDiagonalLinear(heads, head_dim, head_dim, full_precision=True)
        self.fgate_proj = BlockDiagonalLinear(heads, head_dim, head_dim, full_precision=True)
        self.zgate_proj = BlockDiagonalLinear(heads, head_dim, head_dim)
        self.ogate_proj = BlockDiagonalLinear(heads, head_dim, head_dim)
        self.recurrent_kernel = nn.Parameter(torch.empty(heads, head_dim, 4, head_dim))
        self.bias = nn.Parameter(torch.empty(4, heads, head_dim))
        self.head_norm = HeadNorm(d_model, settings.head_norm_eps, settings.backend)

    def forward(
        self,
        x: Tensor,
        document_start: Tensor | None,
        state: ConvCellState | None,
        return_state: bool,
        sequence: SequenceContext = LOCAL,
    ) -> tuple[Tensor, ConvCellState | None]:
        """x [B, S, D], document_start [B, S] bool or None -> y [B, S, D] and the state behind x, if asked for.

        Nothing before the norm mixes heads: sequence ranks compute some heads of all tokens, from the input to the
        cell's output.
        """
        own = sequence.time_to_heads(x.unflatten(-1, (self.settings.n_heads, -1))).flatten(-2)
        document_start = sequence.whole_time(document_start)
        a, new_tail = own, None
        if self.conv is not None:
            convolved, new_tail = self.conv(own, document_start, None if state is None else state.conv_tail, sequence)
            a = F.silu(convolved)
        igate, fgate = self.igate_proj(a, sequence), self.fgate_proj(a, sequence)
        zgate, ogate = (project(own, sequence).to(igate.dtype) for project in (self.zgate_proj, self.ogate_proj))
        bias = sequence.own_heads(self.bias, axis=1)
        recurrent_kernel = sequence.own_heads(self.recurrent_kernel)
        gates = torch.stack([igate, fgate, zgate, ogate], dim=2).unflatten(-1, bias.shape[1:])
        gates = gates + bias.to(gates.dtype)
        initial = None if state is None else state.cell
        h, cell = slstm(
            gates,
            recurrent_kernel,
            document_start=document_start,
            initial_state=initial,
            return_state=return_state,
            gate_soft_cap=self.settings.gate_soft_cap,
            backend=self.settings.backend,
        )
        if statistics.sees_beginning():
            self._record(gates, h, recurrent_kernel, document_start, initial, sequence.rank)
        y = self.head_norm(sequence.heads_to_time(h)).to(x.dtype)
        return y, ConvCellState(new_tail, cell) if return_state else None

    @torch.no_grad()
    def _record(
        self,
        gates: Tensor,
        h: Tensor,
        recurrent_kernel: Tensor,
        document_start: Tensor | None,
        initial: SLSTMState | None,
        rank: int,
    ) -> None:
        """Record the gates with their recurrent part and the stabiliser, for the first tokens of the first sequence."""
        gates, h = gates[0, :_MEASURED_TOKENS], h[0, :_MEASURED_TOKENS].to(gates.dtype)
        first = torch.zeros_like(h[:1]) if initial is None else initial.h[:1].to(h.dtype)
        previous = torch.cat([first, h[:-1]])
        starts = None if document_start is None else document_start[0, :_MEASURED_TOKENS, None, None]
        if starts is not None:
            previous = previous.masked_fill(starts, 0)
        with autocast_disabled(h):
            recurrent = torch.einsum("shi,higo->sgho", previous, recurrent_kernel.to(h.dtype))
        cap = self.settings.gate_soft_cap
        uncapped = (gates + recurrent)[:, :2]
        igate, fgate = soft_cap(uncapped, cap).unbind(1)
        statistics.record_gate(f"{self.statistics_name}.igate", uncapped[:, 0], igate, cap)
        statistics.record_gate(f"{self.statistics_name}.fgate", uncapped[:, 1], fgate, cap)
        heads, first_head = self.settings.n_heads, rank * fgate.shape[1]
        # The units of a head read each other: it remembers as long as the one that forgets least.
        statistics.record_forget_rates(
            self.statistics_name, lambda: statistics.forget_rates(fgate, (0,)).amin(-1), heads, first_head
        )
        stabiliser = stabilisers(igate, fgate, starts, initial)
        statistics.record(f"{self.statistics_name}.stabiliser_min", "min", stabiliser.min)
        statistics.record(f"{self.statistics_name}.stabiliser_max", "max", stabiliser.max)


def stabilisers(igate: Tensor, fgate: Tensor, starts: Tensor | None, initial: SLSTMState | None) -> Tensor:
    """m_t = max(log sigmoid(f_t) + m_{t-1}, i_t) for one sequence, without a loop: [S, NH, DH] float64.

    igate and fgate [S, NH, DH] are capped pre-activations, `starts` is [S, 1, 1] bool. At a first token m is i.
    """
    log_forget = F.logsigmoid(fgate.double())
    if starts is not None:
        # Far below any stabiliser, so that no earlier document wins the maximum; float64 keeps the rest exact enough.
        log_forget = log_forget.masked_fill(starts, -1e6)
    total = log_forget.cumsum(0)
    best = (igate.double() - total).cummax(0).values
    if initial is not None:
        empty = initial.n[0] == 0
        carried = initial.m[0].double().masked_fill(empty, float("-inf"))
        best = torch.maximum(best, carried)
    return total + best


def slstm_bias(shape: Shape, block_index: int, n_blocks: int) -> Tensor:
    """[4, NH, DH]: zeros, but the forget gate has 5 - 12 (j / (DH - 1))^(0.3 + 1.3 l / (NB - 1)) at unit j, block l."""
    bias = empty(shape).zero_()
    exponent = 0.3 + 1.3 * block_index / max(n_blocks - 1, 1)
    unit = torch.linspace(0, 1, shape[-1], dtype=torch.float64, device="cpu")
    bias[_FORGET_SLOT] = (5 - 12 * unit**exponent).float()
    return bias


class SLSTMKind(LayerKind):
    name = "slstm"
    block = "slstm"
    loops_on_cpu = True
    settings_class = SLSTMConfig

    def validate(self, config: ModelConfig, problem: Problem) -> None:
        settings: SLSTMConfig = self.settings(config)
        check_choice(problem, "backend", settings.backend, BACKENDS)
        check_positive(problem, "head_norm_eps", settings.head_norm_eps)
        check_soft_cap(problem, "gate_soft_cap", settings.gate_soft_cap)
        check_convolution(problem, settings.conv_kernel_size)
        check_heads(problem, settings.n_heads, config.d_model, "d_model")

    def module(self, config: ModelConfig, statistics_name: str) -> SLSTM:
        return SLSTM(config.d_model, self.settings(config), statistics_name)

    def parameters(self, config: ModelConfig, block_index: int) -> dict[str, Parameter]:
        settings: SLSTMConfig = self.settings(config)
        d_model, heads, kernel = config.d_model, settings.n_heads, settings.conv_kernel_size
        head_dim = d_model // heads
        parameters = {
            # The cell counts the products with the recurrent kernel.
            "recurrent_kernel": Parameter((heads, head_dim, 4, head_dim), base.RECURRENT_KERNEL, constant(0.0)),
            "bias": Parameter(
                (4, heads, head_dim),
                base.SLSTM_GATES,
                lambda shape, generator: slstm_bias(shape, block_index, config.n_blocks),
            ),
            **convolution_parameters(d_model, kernel),
        }
        for gate in ("igate_proj", "fgate_proj", "zgate_proj", "ogate_proj"):
            shape = (heads, head_dim, head_dim)
            parameters[f"{gate}.weight"] = Parameter(shape, base.SLSTM_GATES, reads_stream(config), base.PROJECTIONS)
        return parameters | {"head_norm.weight": Parameter((d_model,), base.NORMS, constant(1.0))}

    def forward_flops(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> dict[str, float]:
        return {
            base.CONVOLUTION_FLOPS: sequence_length * self._convolution_bias_flops(config),
            "sLSTM cell": sequence_length * self._step_flops(config),
        }

    def decoding_flops(self, config: ModelConfig, context: int) -> float:
        return self._convolution_bias_flops(config) + self._step_flops(config)

    def _convolution_bias_flops(self, config: ModelConfig) -> float:
        return float(config.d_model) if self.settings(config).conv_kernel_size else 0.0

    def _step_flops(self, config: ModelConfig) -> float:
        """One token of the cell (arXiv 2405.04517, equations 8 to 18).

        The recurrent products, and per unit 8 to add up the gates, 7 for m and both weights, 7 for c, n and h, and 3
        for log sigmoid, tanh and sigmoid.
        """
        head_dim = config.d_model // self.settings(config).n_heads
        return config.d_model * (8.0 * head_dim + 25.0)

    def activation_bytes(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> float:
        settings: SLSTMConfig = self.settings(config)
        c, taps = hardware.compute_bytes, 4 * settings.conv_kernel_size
        if not hardware.runs_kernels(settings.backend):
            # What the convolution puts out, before and behind its activation.
            convolved = 2 * c if settings.conv_kernel_size else 0
            return (2 * c + convolved + 48 + taps) * config.d_model
        gate_inputs = 8 if c < 4 else 0
        cell = triton_kept_bytes(1, config.d_model, hardware.compute_dtype, settings.gate_soft_cap is not None)
        return cell + (3 * c + 4 + taps + gate_inputs) * config.d_model

    def cell(self, config: ModelConfig) -> CellForm:
        heads = self.settings(config).n_heads
        return CellForm("slstm", heads, config.d_model // heads, config.d_model // heads)

    def state_elements(self, config: ModelConfig) -> StateElements:
        settings: SLSTMConfig = self.settings(config)
        # h, c, n and m.
        return StateElements(4 * config.d_model, max(0, settings.conv_kernel_size - 1) * config.d_model)

    def sequence_problem(self, config: ModelConfig, ranks: int) -> str | None:
        return by_heads_problem("model.slstm.n_heads", self.settings(config).n_heads, ranks)

    def kernel_cases(self, config: ModelConfig, use: KernelUse) -> list[Case]:
        from kernels.preflight import HeadNormCase, SLSTMCase

        layer: SLSTMConfig = self.settings(config)
        shape = (layer.n_heads, config.d_model // layer.n_heads)
        # The cell puts out what its gates are: float32.
        norm = HeadNormCase(*shape, torch.float32, use.weight_dtype, layer.head_norm_eps, False, layer.backend)
        return [SLSTMCase(*shape, use.dtype, layer.gate_soft_cap, layer.backend), norm]


KIND = SLSTMKind()

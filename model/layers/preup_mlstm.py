"""The mLSTM layer of the NeurIPS block, with its up-projection before the cell.

Axes: B batch, S sequence, D model width, E inner width, NH heads, K convolution kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import statistics
from model.hardware import CPU, Hardware
from model.initial_values import constant, normal, reads_stream, spread, writes_stream
from model.layers import base, mlstm_cell
from model.layers.base import (
    CellForm,
    KernelUse,
    LayerKind,
    Parameter,
    StateElements,
    convolution_parameters,
)
from model.layers.mlstm_cell import Cell, CellInputs
from model.norms import HeadNorm
from model.problems import Problem, check_convolution, check_factor, check_heads
from model.projections import BlockDiagonalLinear, CausalConv, GateLinear, Linear, gate_preactivations
from model.sequence import LOCAL, SequenceContext
from model.state import ConvCellState

if TYPE_CHECKING:
    from kernels.preflight import Case
    from model.config import ModelConfig

FGATE_BIAS_RANGE = (3.0, 6.0)
IGATE_BIAS_STD = 0.1


@dataclass(frozen=True)
class PreUpMLSTMConfig:
    """The mLSTM layer of the NeurIPS block, "pre up-projection" (arXiv 2405.04517, figure 11)."""

    # Heads, each with a memory of its own.
    n_heads: int = 4
    # Inner width as a share of d_model, rounded up to a multiple of 64.
    projection_factor: float = 2.0
    # Tokens that the causal convolution sees; 0: there is none, its activation stays.
    conv_kernel_size: int = 4
    # q, k and v projections are block diagonal with blocks of this width.
    qkv_block_size: int = 4
    # Epsilon of the per-head norm.
    head_norm_eps: float = 1e-5
    # Added to the read-out's denominator after the max.
    cell_eps: float = 1e-6
    # Tokens per chunk of the reference backend; the kernels of a GPU choose theirs. The result does not depend on it.
    reference_chunk_size: int = 64
    # What computes the cell: auto, reference or triton (docs/kernels.md).
    backend: str = "auto"

    def width(self, d_model: int) -> int:
        """E, rounded up to a multiple of 64."""
        return math.ceil(d_model * self.projection_factor / 64) * 64

    def cell(self, d_model: int) -> Cell:
        """The cell of this layer: keys are as wide as values."""
        head_dim = self.width(d_model) // self.n_heads
        return Cell(
            heads=self.n_heads,
            key_dim=head_dim,
            value_dim=head_dim,
            gate="exp",
            normaliser=True,
            eps=self.cell_eps,
            backend=self.backend,
            reference_chunk=self.reference_chunk_size,
        )


class PreUpMLSTM(nn.Module):
    """The mLSTM layer of the NeurIPS block (arXiv 2405.04517, figure 11).

    u, z = W_up x; a = SiLU(conv(u)); q, k from a and v from u; y = W_down((head_norm(cell) + skip * a) * SiLU(z)).
    Without a convolution a = SiLU(u).
    """

    def __init__(self, d_model: int, settings: PreUpMLSTMConfig, statistics_name: str):
        super().__init__()
        self.cell = settings.cell(d_model)
        self.statistics_name = statistics_name
        width, block = settings.width(d_model), settings.qkv_block_size
        self.up_proj = Linear(d_model, 2 * width)
        self.conv = CausalConv(width, settings.conv_kernel_size) if settings.conv_kernel_size else None
        self.q_proj = BlockDiagonalLinear(width // block, block, block)
        self.k_proj = BlockDiagonalLinear(width // block, block, block)
        self.v_proj = BlockDiagonalLinear(width // block, block, block)
        self.igate = GateLinear(3 * width, settings.n_heads)
        self.fgate = GateLinear(3 * width, settings.n_heads)
        self.head_norm = HeadNorm(width, settings.head_norm_eps, settings.backend)
        self.learnable_skip = nn.Parameter(torch.empty(width))
        self.down_proj = Linear(width, d_model)

    def forward(
        self,
        x: Tensor,
        document_start: Tensor | None,
        state: ConvCellState | None,
        return_state: bool,
        sequence: SequenceContext = LOCAL,
    ) -> tuple[Tensor, ConvCellState | None]:
        """x [B, S, D], document_start [B, S] bool or None -> y [B, S, D] and the state behind x, if asked for."""
        u, z = self.up_proj(x).chunk(2, dim=-1)
        convolved, new_tail = u, None
        if self.conv is not None:
            tail = sequence.halo(u, self.conv.history, document_start, None if state is None else state.conv_tail)
            convolved, new_tail = self.conv(u, document_start, tail)
        a = F.silu(convolved)
        q, k, v = self.q_proj(a), self.k_proj(a), self.v_proj(u)
        igate_preact, fgate_preact = gate_preactivations(torch.cat([q, k, v], dim=-1), self.igate, self.fgate)
        q, k, v = (projected.unflatten(-1, (self.cell.heads, -1)) for projected in (q, k, v))
        inputs = CellInputs(q, k, v, igate_preact, fgate_preact, document_start)
        before = None if state is None else state.cell
        entering = mlstm_cell.entering_state(self.cell, inputs, before, sequence)
        h, new_cell = mlstm_cell.run_cell(self.cell, inputs, entering, before, return_state, sequence)
        if statistics.is_recording():
            statistics.record_gate(f"{self.statistics_name}.igate", igate_preact, igate_preact, None)
            statistics.record_gate(f"{self.statistics_name}.fgate", fgate_preact, fgate_preact, None)
            mlstm_cell.record_memory(self.statistics_name, self.cell, inputs, sequence)
            mlstm_cell.record_cell(self.statistics_name, self.cell, inputs, sequence)
        mixed = self.head_norm(h) + self.learnable_skip * a
        y = self.down_proj(mixed * F.silu(z))
        return y, sequence.outgoing(ConvCellState(new_tail, new_cell)) if return_state else None


class PreUpMLSTMKind(LayerKind):
    name = "preup_mlstm"
    block = "mlstm"
    families = ("neurips",)
    has_feed_forward = False
    settings_class = PreUpMLSTMConfig
    speed_settings = ("backend", "reference_chunk_size")

    def validate(self, config: ModelConfig, problem: Problem) -> None:
        preup: PreUpMLSTMConfig = self.settings(config)
        mlstm_cell.check_cell(problem, preup.backend, preup.head_norm_eps, preup.cell_eps, preup.reference_chunk_size)
        check_convolution(problem, preup.conv_kernel_size)
        if not check_factor(problem, "projection_factor", preup.projection_factor):
            return
        width = preup.width(config.d_model)
        if not width > 0:
            factor = preup.projection_factor
            problem("projection_factor", f"{factor} gives a width of {width}; choose a positive factor")
            return
        factors = f"d_model {config.d_model} x projection_factor {preup.projection_factor}"
        check_heads(problem, preup.n_heads, width, f"{factors}, rounded up to a multiple of 64")
        block = preup.qkv_block_size
        if block < 1 or width % block:
            problem("qkv_block_size", f"blocks of {block} do not divide the width {width}; choose a divisor")

    def module(self, config: ModelConfig, statistics_name: str) -> PreUpMLSTM:
        return PreUpMLSTM(config.d_model, self.settings(config), statistics_name)

    def parameters(self, config: ModelConfig, block_index: int) -> dict[str, Parameter]:
        settings: PreUpMLSTMConfig = self.settings(config)
        width, block, kernel = settings.width(config.d_model), settings.qkv_block_size, settings.conv_kernel_size
        heads, reads = settings.n_heads, reads_stream(config)

        def projection(group: str) -> Parameter:
            return Parameter((width // block, block, block), group, reads, base.PROJECTIONS)

        up = Parameter((2 * width, config.d_model), base.UP_AND_DOWN, reads, base.PROJECTIONS)
        down = Parameter((config.d_model, width), base.UP_AND_DOWN, writes_stream(config), base.PROJECTIONS)
        gate = Parameter((heads, 3 * width), base.GATES, constant(0.0), base.PROJECTIONS)
        # Parameters of a module itself come before those of its children.
        return {
            "learnable_skip": Parameter((width,), base.CONVOLUTION, constant(1.0)),
            "up_proj.weight": up,
            **convolution_parameters(width, kernel),
            "q_proj.weight": projection(base.QUERY_AND_KEY),
            "k_proj.weight": projection(base.QUERY_AND_KEY),
            "v_proj.weight": projection(base.VALUE_AND_OUTPUT),
            "igate.weight": gate,
            "igate.bias": Parameter((heads,), base.GATES, normal(IGATE_BIAS_STD)),
            "fgate.weight": gate,
            "fgate.bias": Parameter((heads,), base.GATES, spread(*FGATE_BIAS_RANGE)),
            "head_norm.weight": Parameter((width,), base.NORMS, constant(1.0)),
            "down_proj.weight": down,
        }

    def forward_flops(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> dict[str, float]:
        cell = self._cell(config)
        return {
            # learnable_skip * a and the sum with it, SiLU(z) and the product with it.
            base.PROJECTIONS: 4.0 * sequence_length * cell.v_width,
            base.CONVOLUTION_FLOPS: sequence_length * self._convolution_bias_flops(config),
            mlstm_cell.CELL_FLOPS: mlstm_cell.cell_forward_flops(cell, sequence_length, hardware),
        }

    def decoding_flops(self, config: ModelConfig, context: int) -> float:
        cell = self._cell(config)
        return 4.0 * cell.v_width + self._convolution_bias_flops(config) + mlstm_cell.cell_step_flops(cell)

    def _convolution_bias_flops(self, config: ModelConfig) -> float:
        return float(self._cell(config).v_width) if self.settings(config).conv_kernel_size else 0.0

    def activation_bytes(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> float:
        settings: PreUpMLSTMConfig = self.settings(config)
        cell, width = self._cell(config), settings.width(config.d_model)
        taps = 4 * settings.conv_kernel_size * width
        # Concatenated for the gates, which take bfloat16 as it is on a GPU, and a copy of it elsewhere.
        gate_input = 3 * width * (4 if hardware.device_name == CPU else hardware.compute_bytes)
        wide = 7 if settings.conv_kernel_size else 6
        if hardware.compiles:
            # Made again, as are the sums and products behind the cell: 6 in all, as measured on an H200.
            gate_input, wide = 0, 4
        around = hardware.compute_bytes * (2 * config.d_model + wide * width) + taps + gate_input
        return around + mlstm_cell.cell_activation_bytes(cell, sequence_length, hardware)

    def chunk_state_bytes(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> float:
        return mlstm_cell.cell_chunk_state_bytes(self._cell(config), sequence_length, hardware)

    def cell(self, config: ModelConfig) -> CellForm:
        return mlstm_cell.cell_form(self._cell(config))

    def state_elements(self, config: ModelConfig) -> StateElements:
        settings: PreUpMLSTMConfig = self.settings(config)
        tail = max(0, settings.conv_kernel_size - 1) * settings.width(config.d_model)
        return mlstm_cell.cell_state_elements(self._cell(config), tail)

    def sequence_problem(self, config: ModelConfig, ranks: int) -> str | None:
        """Any number: each hands on the state behind its slice."""
        return None

    def shortest_slice(self, config: ModelConfig) -> int:
        """The convolution looks back into the slice before, and no further."""
        settings: PreUpMLSTMConfig = self.settings(config)
        return max(1, settings.conv_kernel_size - 1)

    def kernel_cases(self, config: ModelConfig, use: KernelUse) -> list[Case]:
        from kernels.preflight import HeadNormCase

        settings, cell = self.settings(config), self._cell(config)
        norm = (use.dtype, use.weight_dtype, settings.head_norm_eps, False, settings.backend)
        return [*mlstm_cell.cell_kernel_cases(cell, use), HeadNormCase(cell.heads, cell.value_dim, *norm)]

    def huggingface_reasons(self, config: ModelConfig, positions: list[int]) -> list[str]:
        """None of its own: its family is refused as a whole."""
        return []

    def _cell(self, config: ModelConfig) -> Cell:
        settings: PreUpMLSTMConfig = self.settings(config)
        return settings.cell(config.d_model)


KIND = PreUpMLSTMKind()

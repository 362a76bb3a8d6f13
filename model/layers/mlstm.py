"""The mLSTM layer of the 7B block.

Axes: B batch, S sequence, D model width, NH heads, DK query/key and DV value dimension of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from kernels.mlstm.gates import GATES
from kernels.soft_cap import soft_cap
from model import statistics
from model.hardware import CPU, Hardware
from model.initial_values import constant, reads_stream, spread, writes_stream
from model.layers import base, mlstm_cell
from model.layers.base import CellForm, KernelUse, LayerKind, Parameter, StateElements
from model.layers.mlstm_cell import Cell, CellInputs, CellState
from model.norms import GatedHeadNorm
from model.problems import Problem, check_choice, check_factor, check_heads, check_soft_cap
from model.projections import GateLinear, Linear, gate_preactivations
from model.sequence import LOCAL, Entering, SequenceContext

if TYPE_CHECKING:
    from kernels.preflight import Case
    from model.config import ModelConfig

FGATE_BIAS_RANGE = (3.0, 6.0)
# transformers sizes the state of its cache with widths rounded up to this, and its weights with the widths themselves.
HUGGINGFACE_CACHE_ALIGNMENT = 64


@dataclass(frozen=True)
class MLSTMConfig:
    """The mLSTM layer of the 7B block (arXiv 2503.13427 §3)."""

    # Heads, each with a memory of its own.
    n_heads: int = 8
    # Total query and key width as a share of d_model (7B: 2048 of 4096).
    qk_dim_factor: float = 0.5
    # Total value width as a share of d_model.
    v_dim_factor: float = 1.0
    # Input gate: "exp" (the 7B) or "sigmoid" (mLSTMsig, arXiv 2503.14376).
    gate: str = "exp"
    # Divide the read-out by max(|n q|, 1). Only gate=sigmoid may switch it off.
    normaliser: bool = True
    # a * tanh(x / a) on the gate pre-activations, after the bias; null: none.
    gate_soft_cap: float | None = 15.0
    # Initial bias of the input gate. Strongly negative: the memory is written to carefully at first.
    igate_bias_init: float = -10.0
    # Epsilon of the per-head LayerNorm; functionally part of the gating (a change of it changes the model).
    head_norm_eps: float = 1e-6
    # Added to the read-out's denominator after the max.
    cell_eps: float = 1e-6
    # Tokens per chunk of the reference backend; the kernels of a GPU choose theirs. The result does not depend on it.
    reference_chunk_size: int = 64
    # What computes the cell: auto, reference or triton (docs/kernels.md).
    backend: str = "auto"

    def qk_width(self, d_model: int) -> int:
        """Total query width, all heads together."""
        return round(d_model * self.qk_dim_factor)

    def v_width(self, d_model: int) -> int:
        """Total value width, all heads together."""
        return round(d_model * self.v_dim_factor)

    def cell(self, d_model: int) -> Cell:
        """The cell of this layer."""
        return Cell(
            heads=self.n_heads,
            key_dim=self.qk_width(d_model) // self.n_heads,
            value_dim=self.v_width(d_model) // self.n_heads,
            gate=self.gate,
            normaliser=self.normaliser,
            eps=self.cell_eps,
            backend=self.backend,
            reference_chunk=self.reference_chunk_size,
        )


class Opened(NamedTuple):
    """What enters the cell, and the gates [B, S, NH] before their soft cap."""

    inputs: CellInputs
    igate: Tensor
    fgate: Tensor


class MLSTM(nn.Module):
    """The mLSTM layer of xLSTM-7B (arXiv 2503.13427 §3.1): out(sigmoid(W_o x) * head_norm(cell(q, k, v, i, f)))."""

    def __init__(self, d_model: int, settings: MLSTMConfig, statistics_name: str):
        super().__init__()
        self.settings = settings
        self.cell = settings.cell(d_model)
        self.statistics_name = statistics_name
        heads, v_width = self.cell.heads, self.cell.v_width
        self.q_proj = Linear(d_model, self.cell.qk_width)
        self.k_proj = Linear(d_model, self.cell.qk_width)
        self.v_proj = Linear(d_model, v_width)
        self.output_gate = Linear(d_model, v_width)
        self.igate = GateLinear(d_model, heads)
        self.fgate = GateLinear(d_model, heads)
        self.head_norm = GatedHeadNorm(v_width, settings.head_norm_eps, settings.backend)
        self.out_proj: nn.Module = Linear(v_width, d_model)

    def forward(
        self,
        x: Tensor,
        document_start: Tensor | None,
        state: CellState | None,
        return_state: bool,
        sequence: SequenceContext = LOCAL,
    ) -> tuple[Tensor, CellState | None]:
        """x [B, S, D], document_start [B, S] bool or None -> y [B, S, D] and the state behind x, if asked for."""
        opened = self.opened(x, document_start)
        entering = self.entering(opened, state, sequence)
        beside = self.beside(x)
        h, new_state = self.inside(opened, entering, state, return_state, sequence)
        if statistics.is_recording():
            self._record(opened, sequence)
        return self.closed(h, beside), new_state

    def opened(self, x: Tensor, document_start: Tensor | None) -> Opened:
        """See SlicedMixer."""
        cap = self.settings.gate_soft_cap
        by_head = (self.cell.heads, -1)
        q, k, v = (project(x).unflatten(-1, by_head) for project in (self.q_proj, self.k_proj, self.v_proj))
        igate, fgate = gate_preactivations(x, self.igate, self.fgate)
        return Opened(CellInputs(q, k, v, soft_cap(igate, cap), soft_cap(fgate, cap), document_start), igate, fgate)

    def entering(self, opened: Opened, state: CellState | None, sequence: SequenceContext) -> Entering[CellState]:
        """See SlicedMixer."""
        return mlstm_cell.entering_state(self.cell, opened.inputs, state, sequence)

    def beside(self, x: Tensor) -> Tensor:
        """The output gate's pre-activations [B, S, NH DV]."""
        gate: Tensor = self.output_gate(x)
        return gate

    def inside(
        self,
        opened: Opened,
        entering: Entering[CellState],
        state: CellState | None,
        return_state: bool,
        sequence: SequenceContext,
    ) -> tuple[Tensor, CellState | None]:
        """h [B, S, NH, DV]; see SlicedMixer."""
        h, new_state = mlstm_cell.run_cell(self.cell, opened.inputs, entering, state, return_state, sequence)
        return h, sequence.outgoing(new_state) if return_state else None

    def closed(self, inside: Tensor, beside: Tensor) -> Tensor:
        """See SlicedMixer."""
        y: Tensor = self.out_proj(self.head_norm(inside, beside))
        return y

    def _record(self, opened: Opened, sequence: SequenceContext) -> None:
        cap, inputs = self.settings.gate_soft_cap, opened.inputs
        statistics.record_gate(f"{self.statistics_name}.igate", opened.igate, inputs.igate_preact, cap)
        statistics.record_gate(f"{self.statistics_name}.fgate", opened.fgate, inputs.fgate_preact, cap)
        if self.settings.normaliser:
            mlstm_cell.record_cell(self.statistics_name, self.cell, inputs, sequence)


class MLSTMKind(LayerKind):
    name = "mlstm"
    block = "mlstm"
    families = ("xlstm_7b",)
    settings_class = MLSTMConfig
    speed_settings = ("backend", "reference_chunk_size")
    first_value_settings = ("igate_bias_init",)

    def validate(self, config: ModelConfig, problem: Problem) -> None:
        mlstm: MLSTMConfig = self.settings(config)
        check_choice(problem, "gate", mlstm.gate, GATES)
        if not mlstm.normaliser and mlstm.gate != "sigmoid":
            problem(
                "normaliser", f"is false with gate={mlstm.gate}; only gate=sigmoid works without it, set it to true"
            )
        check_soft_cap(problem, "gate_soft_cap", mlstm.gate_soft_cap)
        mlstm_cell.check_cell(problem, mlstm.backend, mlstm.head_norm_eps, mlstm.cell_eps, mlstm.reference_chunk_size)
        if mlstm.n_heads < 1:
            problem("n_heads", f"is {mlstm.n_heads}; it must be a positive number")
        for key in ("qk_dim_factor", "v_dim_factor"):
            factor = getattr(mlstm, key)
            if not check_factor(problem, key, factor):
                continue
            width = round(config.d_model * factor)
            if not width > 0:
                problem(key, f"{factor} gives a width of {width}; choose a positive factor")
            elif mlstm.n_heads > 0:
                check_heads(problem, mlstm.n_heads, width, f"d_model {config.d_model} x {key} {factor}")

    def module(self, config: ModelConfig, statistics_name: str) -> MLSTM:
        return MLSTM(config.d_model, self.settings(config), statistics_name)

    def parameters(self, config: ModelConfig, block_index: int) -> dict[str, Parameter]:
        settings: MLSTMConfig = self.settings(config)
        cell, d_model = settings.cell(config.d_model), config.d_model
        reads, zero = reads_stream(config), constant(0.0)

        def matrix(width: int, group: str, initial: base.InitialValue) -> Parameter:
            return Parameter((width, d_model), group, initial, base.PROJECTIONS)

        biases = {"igate": constant(settings.igate_bias_init), "fgate": spread(*FGATE_BIAS_RANGE)}
        parameters = {
            "q_proj.weight": matrix(cell.qk_width, base.QUERY_AND_KEY, reads),
            "k_proj.weight": matrix(cell.qk_width, base.QUERY_AND_KEY, reads),
            "v_proj.weight": matrix(cell.v_width, base.VALUE_AND_OUTPUT, reads),
            "output_gate.weight": matrix(cell.v_width, base.VALUE_AND_OUTPUT, zero),
        }
        for gate, bias in biases.items():
            parameters[f"{gate}.weight"] = matrix(cell.heads, base.GATES, zero)
            parameters[f"{gate}.bias"] = Parameter((cell.heads,), base.GATES, bias)
        parameters["head_norm.weight"] = Parameter((cell.v_width,), base.NORMS, constant(1.0))
        out = Parameter((d_model, cell.v_width), base.VALUE_AND_OUTPUT, writes_stream(config), base.PROJECTIONS)
        return parameters | {"out_proj.weight": out}

    def forward_flops(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> dict[str, float]:
        cell = self._cell(config)
        return {
            # The product with the output gate.
            base.PROJECTIONS: float(sequence_length * cell.v_width),
            mlstm_cell.CELL_FLOPS: mlstm_cell.cell_forward_flops(cell, sequence_length, hardware),
        }

    def decoding_flops(self, config: ModelConfig, context: int) -> float:
        cell = self._cell(config)
        return cell.v_width + mlstm_cell.cell_step_flops(cell)

    def activation_bytes(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> float:
        cell, c = self._cell(config), hardware.compute_bytes
        # The gates take bfloat16 as it is on a GPU, and a copy of it elsewhere.
        gate_input = 4 * config.d_model if c < 4 and hardware.device_name == CPU else 0
        around = c * (2 * config.d_model + 3 * cell.v_width) + gate_input
        return around + mlstm_cell.cell_activation_bytes(cell, sequence_length, hardware)

    def chunk_state_bytes(self, config: ModelConfig, sequence_length: int, hardware: Hardware) -> float:
        return mlstm_cell.cell_chunk_state_bytes(self._cell(config), sequence_length, hardware)

    def cell(self, config: ModelConfig) -> CellForm:
        return mlstm_cell.cell_form(self._cell(config))

    def state_elements(self, config: ModelConfig) -> StateElements:
        return mlstm_cell.cell_state_elements(self._cell(config))

    def sequence_problem(self, config: ModelConfig, ranks: int) -> str | None:
        """Any number: each hands on the state behind its slice."""
        return None

    def kernel_cases(self, config: ModelConfig, use: KernelUse) -> list[Case]:
        from kernels.preflight import HeadNormCase

        settings, cell = self.settings(config), self._cell(config)
        norm = (use.dtype, use.weight_dtype, settings.head_norm_eps, True, settings.backend)
        return [*mlstm_cell.cell_kernel_cases(cell, use), HeadNormCase(cell.heads, cell.value_dim, *norm)]

    def huggingface_reasons(self, config: ModelConfig, positions: list[int]) -> list[str]:
        mlstm: MLSTMConfig = self.settings(config)
        reasons = []
        if mlstm.gate != "exp":
            reasons.append(f"model.mlstm.gate={mlstm.gate}: the input gate is always exponential there")
        if not mlstm.normaliser:
            reasons.append("model.mlstm.normaliser=false: the read-out is always normalised there")
        if mlstm.gate_soft_cap is None:
            reasons.append("model.mlstm.gate_soft_cap=null: the gates always have a soft cap there")
        if mlstm.head_norm_eps != config.norm_eps:
            reasons.append(
                f"model.mlstm.head_norm_eps={mlstm.head_norm_eps} differs from model.norm_eps={config.norm_eps}: "
                "both norms share one epsilon there"
            )
        widths = {"qk_dim_factor": mlstm.qk_width(config.d_model), "v_dim_factor": mlstm.v_width(config.d_model)}
        return reasons + [
            f"model.mlstm.{key} gives a width of {width}: it must be a multiple of {HUGGINGFACE_CACHE_ALIGNMENT} "
            "there, else the cache for generation has another shape than the state"
            for key, width in widths.items()
            if width % HUGGINGFACE_CACHE_ALIGNMENT
        ]

    def _cell(self, config: ModelConfig) -> Cell:
        settings: MLSTMConfig = self.settings(config)
        return settings.cell(config.d_model)


KIND = MLSTMKind()

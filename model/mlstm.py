"""The two mLSTM layers: of the 7B block, and of the NeurIPS block with its up-projection before the cell.

Axes: B batch, S sequence, D model width, E inner width, NH heads, DK query/key and DV value dimension of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.mlstm import MLSTMState, mlstm, mlstm_statistics
from kernels.mlstm.step import DecodingState, mlstm_step
from kernels.precision import compute_dtype
from kernels.soft_cap import soft_cap
from model import statistics
from model.config import ModelConfig
from model.norms import GatedHeadNorm, HeadNorm
from model.projections import BlockDiagonalLinear, CausalConv, GateLinear, Linear
from model.state import ConvCellState


class MLSTM(nn.Module):
    """The mLSTM layer of xLSTM-7B (arXiv 2503.13427 §3.1): out(sigmoid(W_o x) * head_norm(cell(q, k, v, i, f)))."""

    def __init__(self, config: ModelConfig, statistics_name: str):
        super().__init__()
        self.settings = config.mlstm
        self.statistics_name = statistics_name
        heads, d_model, v_dim = self.settings.n_heads, config.d_model, config.mlstm_v_dim
        self.q_proj = Linear(d_model, config.mlstm_qk_dim)
        self.k_proj = Linear(d_model, config.mlstm_qk_dim)
        self.v_proj = Linear(d_model, v_dim)
        self.output_gate = Linear(d_model, v_dim)
        self.igate = GateLinear(d_model, heads)
        self.fgate = GateLinear(d_model, heads)
        self.head_norm = GatedHeadNorm(v_dim, self.settings.head_norm_eps, self.settings.backend)
        self.out_proj = Linear(v_dim, d_model)

    def forward(
        self, x: Tensor, document_start: Tensor | None, state: MLSTMState | None, return_state: bool
    ) -> tuple[Tensor, MLSTMState | None]:
        """x [B, S, D], document_start [B, S] bool or None -> y [B, S, D] and the state behind x, if asked for."""
        settings = self.settings
        by_head = (settings.n_heads, -1)
        q, k, v = (project(x).unflatten(-1, by_head) for project in (self.q_proj, self.k_proj, self.v_proj))
        gate_input = x.to(compute_dtype(x, self.igate.weight))
        igate, fgate = self.igate(gate_input), self.fgate(gate_input)
        igate_preact = soft_cap(igate, settings.gate_soft_cap)
        fgate_preact = soft_cap(fgate, settings.gate_soft_cap)
        h, new_state = _run_cell(
            (q, k, v, igate_preact, fgate_preact),
            document_start,
            state,
            return_state,
            settings.chunk_size,
            gate=settings.gate,
            normaliser=settings.normaliser,
            eps=settings.cell_eps,
            backend=settings.backend,
        )
        if statistics.is_recording():
            statistics.record_gate(f"{self.statistics_name}.igate", igate, igate_preact, settings.gate_soft_cap)
            statistics.record_gate(f"{self.statistics_name}.fgate", fgate, fgate_preact, settings.gate_soft_cap)
            if settings.normaliser:
                _record_cell(self.statistics_name, q, k, igate_preact, fgate_preact, document_start, settings.gate)
        return self.out_proj(self.head_norm(h, self.output_gate(x))), new_state


class PreUpMLSTM(nn.Module):
    """The mLSTM layer of the NeurIPS block (arXiv 2405.04517, figure 11).

    u, z = W_up x; a = SiLU(conv(u)); q, k from a and v from u; y = W_down((head_norm(cell) + skip * a) * SiLU(z)).
    """

    def __init__(self, config: ModelConfig, statistics_name: str):
        super().__init__()
        self.settings = config.preup_mlstm
        self.statistics_name = statistics_name
        width, block = config.preup_dim, self.settings.qkv_block_size
        self.up_proj = Linear(config.d_model, 2 * width)
        self.conv = CausalConv(width, self.settings.conv_kernel_size)
        self.q_proj = BlockDiagonalLinear(width // block, block, block)
        self.k_proj = BlockDiagonalLinear(width // block, block, block)
        self.v_proj = BlockDiagonalLinear(width // block, block, block)
        self.igate = GateLinear(3 * width, self.settings.n_heads)
        self.fgate = GateLinear(3 * width, self.settings.n_heads)
        self.head_norm = HeadNorm(width, self.settings.head_norm_eps, self.settings.backend)
        self.learnable_skip = nn.Parameter(torch.empty(width))
        self.down_proj = Linear(width, config.d_model)

    def forward(
        self, x: Tensor, document_start: Tensor | None, state: ConvCellState | None, return_state: bool
    ) -> tuple[Tensor, ConvCellState | None]:
        """x [B, S, D], document_start [B, S] bool or None -> y [B, S, D] and the state behind x, if asked for."""
        settings = self.settings
        u, z = self.up_proj(x).chunk(2, dim=-1)
        convolved, new_tail = self.conv(u, document_start, None if state is None else state.conv_tail)
        a = F.silu(convolved)
        q, k, v = self.q_proj(a), self.k_proj(a), self.v_proj(u)
        gate_input = torch.cat([q, k, v], dim=-1)
        gate_input = gate_input.to(compute_dtype(gate_input, self.igate.weight))
        igate_preact, fgate_preact = self.igate(gate_input), self.fgate(gate_input)
        q, k, v = (projected.unflatten(-1, (settings.n_heads, -1)) for projected in (q, k, v))
        h, cell = _run_cell(
            (q, k, v, igate_preact, fgate_preact),
            document_start,
            None if state is None else state.cell,
            return_state,
            settings.chunk_size,
            eps=settings.cell_eps,
            backend=settings.backend,
        )
        if statistics.is_recording():
            statistics.record_gate(f"{self.statistics_name}.igate", igate_preact, igate_preact, None)
            statistics.record_gate(f"{self.statistics_name}.fgate", fgate_preact, fgate_preact, None)
            _record_cell(self.statistics_name, q, k, igate_preact, fgate_preact, document_start, "exp")
        mixed = self.head_norm(h) + self.learnable_skip * a
        return self.down_proj(mixed * F.silu(z)), ConvCellState(new_tail, cell) if return_state else None


def _run_cell(
    inputs: tuple[Tensor, ...],
    document_start: Tensor | None,
    state: MLSTMState | DecodingState | None,
    return_state: bool,
    chunk_size: int,
    **options,
) -> tuple[Tensor, MLSTMState | DecodingState | None]:
    """The cell over a sequence, or its step where one token continues a state that it may overwrite."""
    if isinstance(state, DecodingState):
        if inputs[0].shape[1] == 1 and document_start is None and not torch.is_grad_enabled():
            h = mlstm_step(*(x.squeeze(1) for x in inputs), state, **options)
            return h[:, None], state
        state = state.as_mlstm_state()
    return mlstm(
        *inputs,
        document_start=document_start,
        initial_state=state,
        return_state=return_state,
        reference_chunk_size=chunk_size,
        **options,
    )


def _record_cell(
    name: str,
    q: Tensor,
    k: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    document_start: Tensor | None,
    gate: str,
) -> None:
    """Record the stabiliser's range and how often the normaliser sits on its floor (first sequence of the batch)."""
    measured = mlstm_statistics(q, k, igate_preact, fgate_preact, document_start=document_start, gate=gate)
    for key, reduction in (("stabiliser_min", "min"), ("stabiliser_max", "max"), ("normaliser_floor_fraction", "mean")):
        statistics.record(f"{name}.{key}", reduction, lambda key=key: measured[key])

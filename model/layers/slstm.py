"""The sLSTM layer: a recurrence with memory mixing, four gates each of which sees the previous output.

Axes: B batch, S sequence, D model width, NH heads, DH head dimension. Gate slots, in order: input i, forget f, cell
input z, output o.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.precision import autocast_disabled
from kernels.slstm import SLSTMState, slstm
from kernels.soft_cap import soft_cap
from model import statistics
from model.config import ModelConfig
from model.norms import HeadNorm
from model.projections import BlockDiagonalLinear, CausalConv
from model.state import ConvCellState

_MEASURED_TOKENS = 256


class SLSTM(nn.Module):
    """The sLSTM layer of arXiv 2405.04517, figure 10: head_norm(cell(W_i a, W_f a, W_z x, W_o x)), a = SiLU(conv(x)).

    The input and forget gates (and the whole cell) compute in float32 at least, whatever the dtype of the model.
    """

    def __init__(self, config: ModelConfig, statistics_name: str):
        super().__init__()
        self.settings = config.slstm
        self.statistics_name = statistics_name
        heads = self.settings.n_heads
        head_dim = config.d_model // heads
        self.conv = CausalConv(config.d_model, self.settings.conv_kernel_size)
        self.igate_proj = BlockDiagonalLinear(heads, head_dim, head_dim, full_precision=True)
        self.fgate_proj = BlockDiagonalLinear(heads, head_dim, head_dim, full_precision=True)
        self.zgate_proj = BlockDiagonalLinear(heads, head_dim, head_dim)
        self.ogate_proj = BlockDiagonalLinear(heads, head_dim, head_dim)
        self.recurrent_kernel = nn.Parameter(torch.empty(heads, head_dim, 4, head_dim))
        self.bias = nn.Parameter(torch.empty(4, heads, head_dim))
        self.head_norm = HeadNorm(config.d_model, self.settings.head_norm_eps, self.settings.backend)

    def forward(
        self, x: Tensor, document_start: Tensor | None, state: ConvCellState | None, return_state: bool
    ) -> tuple[Tensor, ConvCellState | None]:
        """x [B, S, D], document_start [B, S] bool or None -> y [B, S, D] and the state behind x, if asked for."""
        convolved, new_tail = self.conv(x, document_start, None if state is None else state.conv_tail)
        a = F.silu(convolved)
        igate, fgate = self.igate_proj(a), self.fgate_proj(a)
        zgate, ogate = self.zgate_proj(x).to(igate.dtype), self.ogate_proj(x).to(igate.dtype)
        gates = torch.stack([igate, fgate, zgate, ogate], dim=2).unflatten(-1, self.bias.shape[1:])
        gates = gates + self.bias.to(gates.dtype)
        initial = None if state is None else state.cell
        h, cell = slstm(
            gates,
            self.recurrent_kernel,
            document_start=document_start,
            initial_state=initial,
            return_state=return_state,
            gate_soft_cap=self.settings.gate_soft_cap,
            backend=self.settings.backend,
        )
        if statistics.is_recording():
            self._record(gates, h, document_start, initial)
        y = self.head_norm(h).to(x.dtype)
        return y, ConvCellState(new_tail, cell) if return_state else None

    @torch.no_grad()
    def _record(self, gates: Tensor, h: Tensor, document_start: Tensor | None, initial: SLSTMState | None) -> None:
        """Record the gates with their recurrent part and the stabiliser, for the first tokens of the first sequence."""
        gates, h = gates[0, :_MEASURED_TOKENS], h[0, :_MEASURED_TOKENS].to(gates.dtype)
        first = torch.zeros_like(h[:1]) if initial is None else initial.h[:1].to(h.dtype)
        previous = torch.cat([first, h[:-1]])
        starts = None if document_start is None else document_start[0, :_MEASURED_TOKENS, None, None]
        if starts is not None:
            previous = previous.masked_fill(starts, 0)
        with autocast_disabled(h):
            recurrent = torch.einsum("shi,higo->sgho", previous, self.recurrent_kernel.to(h.dtype))
        cap = self.settings.gate_soft_cap
        uncapped = (gates + recurrent)[:, :2]
        igate, fgate = soft_cap(uncapped, cap).unbind(1)
        statistics.record_gate(f"{self.statistics_name}.igate", uncapped[:, 0], igate, cap)
        statistics.record_gate(f"{self.statistics_name}.fgate", uncapped[:, 1], fgate, cap)
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

"""The mLSTM cell as both mLSTM layers use it: running it, spreading it over sequence ranks, its costs and its checks.

The layers differ in what surrounds the cell; everything here depends on its heads alone.

Axes: B batch, S sequence, L chunk, NH heads, DK query/key and DV value dimension of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from kernels.backend_choice import BACKENDS
from kernels.mlstm import (
    Border,
    CellSettings,
    MLSTMState,
    accounting,
    cell_inputs,
    mlstm,
    mlstm_slice,
    mlstm_state,
    mlstm_statistics,
)
from kernels.mlstm.chunkwise import tiles
from kernels.mlstm.step import DecodingState, mlstm_step
from model import statistics
from model.hardware import Hardware
from model.layers.base import CellForm, KernelUse, StateElements
from model.problems import Problem, check_choice, check_positive
from model.sequence import Entering, ScaledSums, SequenceContext, SliceSummary
from model.state import for_decoding

if TYPE_CHECKING:
    from kernels.preflight import Case

CellState = MLSTMState | DecodingState
CELL_FLOPS = "mLSTM cell"


@dataclass(frozen=True)
class Cell:
    """The heads of a layer and how their cell computes.

    Attributes:
        heads, key_dim, value_dim: NH, DK and DV.
        gate, normaliser, eps, backend: as in kernels.mlstm.mlstm.
        reference_chunk: tokens per chunk of the reference backend.
    """

    heads: int
    key_dim: int
    value_dim: int
    gate: str
    normaliser: bool
    eps: float
    backend: str
    reference_chunk: int

    @property
    def qk_width(self) -> int:
        return self.heads * self.key_dim

    @property
    def v_width(self) -> int:
        return self.heads * self.value_dim

    def chunk_tokens(self, hardware: Hardware) -> int:
        """L of the chunkwise form: of the kernels on a GPU, else of the reference."""
        if not hardware.runs_kernels(self.backend):
            return self.reference_chunk
        dtype = torch.bfloat16 if hardware.compute_bytes < 4 else torch.float32
        return tiles.chunk_tokens(self.key_dim, self.value_dim, dtype, hardware.device_name)


@dataclass
class CellInputs:
    """What enters the cell: q, k [B, S, NH, DK], v [B, S, NH, DV], gate pre-activations [B, S, NH], starts [B, S]."""

    q: Tensor
    k: Tensor
    v: Tensor
    igate_preact: Tensor
    fgate_preact: Tensor
    document_start: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.igate_preact, self.fgate_preact


def entering_state(
    cell: Cell, inputs: CellInputs, before: CellState | None, sequence: SequenceContext
) -> Entering[CellState]:
    """Begin to find the state that enters this rank's slice, where `before` is the one before the sequence."""
    return sequence.incoming(lambda: summarise(cell, inputs), before)


def _run_slice(
    cell: Cell, inputs: CellInputs, entering: Entering[CellState], before: CellState | None
) -> tuple[Tensor, CellState]:
    """The cell over this rank's slice, whose gradients cross its borders."""
    state = entering.state()
    q, k, v, igate_preact, fgate_preact = inputs.tensors
    return mlstm_slice(
        q,
        cell_inputs(k, v, igate_preact, fgate_preact, inputs.document_start, _undecoded(state)),
        CellSettings(cell.gate, cell.normaliser, cell.eps),
        # What crosses borders is never packed for decoding.
        border=cast("Border", entering.border),
        before=None if before is None else _undecoded(before),
        reference_chunk_size=cell.reference_chunk,
        backend=cell.backend,
    )


def run_cell(
    cell: Cell,
    inputs: CellInputs,
    entering: Entering[CellState],
    before: CellState | None,
    return_state: bool,
    sequence: SequenceContext,
) -> tuple[Tensor, CellState | None]:
    """h [B, S, NH, DV] and the state behind it: the cell over a sequence or this rank's slice of it, or its step where
    one token continues a state that it may overwrite. `entering`: what `entering_state` gave for the state `before`."""
    if entering.border is not None:
        return sequence.apart(_run_slice, cell, inputs, entering, before)
    state = entering.state()
    if isinstance(state, DecodingState):
        if inputs.q.shape[1] == 1 and inputs.document_start is None and not torch.is_grad_enabled():
            q, k, v, igate_preact, fgate_preact = (x.squeeze(1) for x in inputs.tensors)
            h = mlstm_step(
                q,
                k,
                v,
                igate_preact,
                fgate_preact,
                state,
                gate=cell.gate,
                normaliser=cell.normaliser,
                eps=cell.eps,
                backend=cell.backend,
            )
            return h[:, None], state
        state = state.as_mlstm_state()
    return mlstm(
        *inputs.tensors,
        document_start=inputs.document_start,
        initial_state=state,
        return_state=return_state,
        gate=cell.gate,
        normaliser=cell.normaliser,
        eps=cell.eps,
        reference_chunk_size=cell.reference_chunk,
        backend=cell.backend,
    )


def _undecoded(state: CellState | None) -> MLSTMState:
    assert state is not None
    return state.as_mlstm_state() if isinstance(state, DecodingState) else state


@for_decoding.register
def _(state: MLSTMState, room: int | None = None) -> DecodingState:
    return DecodingState.of(state)


class MemorySums:
    """The memory [B, NH, DK * DV + DK] in a row, C before n: a model.sequence.StateForm."""

    def __init__(self, cell: Cell):
        self._key_dim, self._value_dim = cell.key_dim, cell.value_dim

    def sums_of(self, state: CellState) -> ScaledSums:
        """C and n in a row."""
        state = _undecoded(state)
        return ScaledSums(torch.cat([state.C.flatten(2), state.n], dim=2), state.m)

    def state_of(self, sums: ScaledSums) -> MLSTMState:
        """The memory with this C and n."""
        C, n = sums.values.split([self._key_dim * self._value_dim, self._key_dim], dim=2)
        return MLSTMState(C.unflatten(2, (self._key_dim, self._value_dim)), n, sums.log_scale)


def summarise(cell: Cell, inputs: CellInputs) -> SliceSummary[CellState]:
    """What a slice does to the memory that enters it, at the cost of the recurrence between its chunks."""
    summary = mlstm_state(
        inputs.k,
        inputs.v,
        inputs.igate_preact,
        inputs.fgate_preact,
        document_start=inputs.document_start,
        gate=cell.gate,
        normaliser=cell.normaliser,
        backend=cell.backend,
    )
    form = MemorySums(cell)
    return SliceSummary(form, form.sums_of(summary.state), summary.log_kept)


def record_cell(name: str, cell: Cell, inputs: CellInputs, sequence: SequenceContext) -> None:
    """Record the stabiliser's range and how often the normaliser sits on its floor (first sequence of the batch)."""
    # The measured tokens are the first of the sequence.
    if sequence.rank > 0 or not statistics.sees_beginning():
        return
    q, k, _, igate_preact, fgate_preact = inputs.tensors
    start = inputs.document_start
    measured = mlstm_statistics(q, k, igate_preact, fgate_preact, document_start=start, gate=cell.gate)
    statistics.record(f"{name}.stabiliser_min", "min", lambda: measured["stabiliser_min"])
    statistics.record(f"{name}.stabiliser_max", "max", lambda: measured["stabiliser_max"])
    statistics.record(f"{name}.normaliser_floor_fraction", "mean", lambda: measured["normaliser_floor_fraction"])


def check_cell(problem: Problem, backend: str, head_norm_eps: float, cell_eps: float, reference_chunk: int) -> None:
    """What both layers demand of the settings of their cell."""
    check_choice(problem, "backend", backend, BACKENDS)
    check_positive(problem, "head_norm_eps", head_norm_eps)
    check_positive(problem, "cell_eps", cell_eps)
    check_positive(problem, "reference_chunk_size", reference_chunk)


def cell_forward_flops(cell: Cell, sequence_length: int, hardware: Hardware) -> float:
    """FLOPs of the cell over one sequence."""
    chunk = min(cell.chunk_tokens(hardware), sequence_length)
    return mlstm_cell_flops(cell.heads, cell.key_dim, cell.value_dim, sequence_length, chunk)


def mlstm_cell_flops(heads: int, qk_head_dim: int, v_head_dim: int, sequence_length: int, chunk_size: int) -> float:
    """FLOPs of the chunkwise mLSTM cell, forward, for one layer and sequence; a last chunk that is cut short counts so.

    Per head and chunk (arXiv 2510.02228): gate sums L(L+1)/2 + 2L; scalars of the state 5 + 5L; update of C and
    read-out through it 2 DK DV + 4L DK DV + 3L DK; update of n 2 DK + 4L DK; within the chunk L(L+1)/2 + 6L^2 + 2L +
    2L^2 (DK + DV + 2); combining both 7L + 2L DV.
    """
    whole, rest = divmod(sequence_length, chunk_size)
    per_head = whole * _chunk_flops(qk_head_dim, v_head_dim, chunk_size)
    if rest:
        per_head += _chunk_flops(qk_head_dim, v_head_dim, rest)
    return float(heads * per_head)


def _chunk_flops(dk: int, dv: int, length: int) -> float:
    gates = 0.5 * length * (length + 1) + 2 * length
    scalars = 5 + 5 * length
    memory = 2 * dk * dv + 4 * length * dk * dv + 3 * length * dk
    normaliser = 2 * dk + 4 * length * dk
    within = 0.5 * length * (length + 1) + 6 * length**2 + 2 * length + 2 * length**2 * (dk + dv + 2)
    combine = 7 * length + 2 * length * dv
    return gates + scalars + memory + normaliser + within + combine


def cell_step_flops(cell: Cell) -> float:
    """FLOPs of one token in the recurrent form.

    Per head gates 9, update 4 DK DV, denominator 6 DK + DV + 3, read-out 2 DK DV + DK (arXiv 2510.02228).
    """
    dk, dv = cell.key_dim, cell.value_dim
    return cell.heads * (9 + 4 * dk * dv + 6 * dk + dv + 3 + 2 * dk * dv + dk)


def cell_activation_bytes(cell: Cell, sequence_length: int, hardware: Hardware) -> float:
    """Bytes per token that the cell keeps, its output excepted (model/memory.py has the formulas)."""
    heads, dk, dv = cell.heads, cell.key_dim, cell.value_dim
    chunk = cell.chunk_tokens(hardware)
    if not hardware.runs_kernels(cell.backend):
        chunk = min(chunk, sequence_length)
        fp32_values = 8 * cell.v_width
        tokens_part = 24 * heads * dk + 8 * heads * (dv + 1) + 12 * heads * chunk
        return fp32_values + tokens_part + 8 * heads * dk * (dv + 1) / chunk
    shape, dtype = accounting.CellShape(1, sequence_length, heads, dk, dv), hardware.compute_dtype
    kept = accounting.triton_kept_bytes(shape, dtype, torch.float32, chunk, keep_chunk_states=True)
    return sum(kept) / sequence_length - hardware.compute_bytes * cell.v_width


def cell_chunk_state_bytes(cell: Cell, sequence_length: int, hardware: Hardware) -> float:
    """Of these, those of the memory that enters each chunk."""
    if not hardware.runs_kernels(cell.backend):
        return 0.0
    shape, dtype = (
        accounting.CellShape(1, sequence_length, cell.heads, cell.key_dim, cell.value_dim),
        hardware.compute_dtype,
    )
    chunk = cell.chunk_tokens(hardware)
    kept = accounting.triton_kept_bytes(shape, dtype, torch.float32, chunk, keep_chunk_states=True)
    return kept.chunk_states / sequence_length


def cell_form(cell: Cell) -> CellForm:
    """What its time depends on."""
    return CellForm("mlstm", cell.heads, cell.key_dim, cell.value_dim)


def cell_state_elements(cell: Cell, convolution: int = 0) -> StateElements:
    """C, n and m, and the last inputs of the convolution before the cell, if there is one."""
    recurrent = cell.heads * (cell.key_dim * cell.value_dim + cell.key_dim + 1)
    return StateElements(recurrent=recurrent, convolution=convolution)


# Sequences that are enough for the kernels to choose the tiles of any larger batch.
_LARGEST_BATCH = 32


def cell_kernel_cases(cell: Cell, use: KernelUse) -> Iterator[Case]:
    """The cell with inputs where the normaliser divides and where its floor does."""
    from kernels.preflight import MLSTMCase

    sizes: dict[int, bool] = {}
    for batch, trains in use.batches.items():
        size = min(batch, _LARGEST_BATCH)
        sizes[size] = sizes.get(size, False) or trains
    for size, trains in sizes.items():
        for bias in (2.0, -10.0):
            yield MLSTMCase(
                cell.heads,
                cell.key_dim,
                cell.value_dim,
                use.dtype,
                bias,
                gate=cell.gate,
                normaliser=cell.normaliser,
                eps=cell.eps,
                batch=size,
                backend=cell.backend,
                trains=trains,
            )

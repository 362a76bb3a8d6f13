"""The mLSTM cell over a slice of a sequence whose neighbours are computed elsewhere.

It is one node in the graph of gradients. Its backward pass exchanges gradients with theirs (kernels.mlstm.border)
between two parts of its own work.

Axes: B batch, S tokens of the slice, NH heads, DK query/key and DV value dimension of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.mlstm.border import Border, SliceEnd
from kernels.mlstm.inputs import CellGradients, CellInputs, CellSettings
from kernels.mlstm.reference import mlstm_chunkwise
from kernels.mlstm.state import MLSTMState

# Of C and n; None: zeros.
StateGradient = tuple[Tensor | None, Tensor | None]


class ComputedSlice(NamedTuple):
    """A slice as its backward pass finds it: q, inputs and h as of `run_slice`, and what its form kept besides."""

    q: Tensor
    inputs: CellInputs
    h: Tensor
    kept: tuple[Tensor | None, ...]


class SliceForm(Protocol):
    """One way to compute a slice."""

    def run(self, q: Tensor, inputs: CellInputs) -> tuple[Tensor, MLSTMState, tuple[Tensor | None, ...]]:
        """h [B, S, NH, DV], the state that leaves, and what the backward pass needs besides."""
        ...

    def gradients(
        self, computed: ComputedSlice, grad_h: Tensor | None, grad_end: StateGradient, end: SliceEnd
    ) -> CellGradients:
        """From the gradients of h (None: zeros) and of the state that leaves, by this rank's use of them."""
        ...


@dataclass(frozen=True)
class ReferenceSlice:
    """The reference, which runs again in the backward pass: nothing of its graph is kept."""

    settings: CellSettings
    chunk_size: int

    def run(self, q: Tensor, inputs: CellInputs) -> tuple[Tensor, MLSTMState, tuple[Tensor | None, ...]]:
        h, state = mlstm_chunkwise(q, inputs, self.settings, return_state=True, chunk_size=self.chunk_size)
        assert state is not None
        return h, state, ()

    def gradients(
        self, computed: ComputedSlice, grad_h: Tensor | None, grad_end: StateGradient, end: SliceEnd
    ) -> CellGradients:
        inputs = computed.inputs
        tokens = [x.detach().requires_grad_() for x in (computed.q, *inputs[:4])]
        assert inputs.C_initial is not None and inputs.n_initial is not None
        C, n = (x.detach().requires_grad_() for x in (inputs.C_initial, inputs.n_initial))
        q, k, v, igate_preact, fgate_preact = tokens
        entered = [C, n]
        with torch.enable_grad():
            again = CellInputs(k, v, igate_preact, fgate_preact, inputs.document_start, C, n, inputs.m_initial)
            h_again, state, _ = self.run(q, again)
        results = (h_again, state.C, state.n)

        def differentiate(grads: tuple[Tensor | None, ...], wanted: list[Tensor], again: bool) -> tuple[Tensor, ...]:
            filled = [
                torch.zeros_like(result) if grad is None else grad.to(result.dtype)
                for result, grad in zip(results, grads, strict=True)
            ]
            return torch.autograd.grad(results, wanted, filled, retain_graph=again, materialize_grads=True)

        end.start_back(*differentiate((grad_h, *grad_end), entered, True))
        grads = (grad_h, *end.leaving_gradient(*grad_end))
        return CellGradients(*differentiate(grads, [*tokens, *entered], False))


def run_slice(
    form: SliceForm, q: Tensor, inputs: CellInputs, border: Border, before: MLSTMState | None
) -> tuple[Tensor, MLSTMState]:
    """h [B, S, NH, DV] and the state that leaves the slice.

    Args:
        form: what computes it.
        q, inputs: as for every form of the cell. The initial state is the one that enters, without a graph of
            gradients.
        border: what connects the slice with its neighbours.
        before: the state before the whole sequence, whose gradient arrives at the first slice; None: the empty state.
    """
    of_before = (None, None) if before is None else (before.C, before.n)
    h, C, n, m = _Slice.apply(form, border, *of_before, q, *inputs)
    return h, MLSTMState(C, n, m)


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, form: SliceForm, border: Border, C_before: Tensor | None, n_before: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, inputs = tensors[0], CellInputs(*tensors[1:])
        h, state, kept = form.run(q, inputs)
        ctx.form, ctx.border = form, border
        ctx.dtypes_before = None if C_before is None or n_before is None else (C_before.dtype, n_before.dtype)
        ctx.save_for_backward(*tensors, h, state.m, *kept)
        ctx.mark_non_differentiable(state.m)
        ctx.set_materialize_grads(False)
        return h, state.C, state.n, state.m

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_h: Tensor | None, grad_C: Tensor | None, grad_n: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        q, *rest = ctx.saved_tensors
        inputs, (h, m_leaving, *kept) = CellInputs(*rest[:8]), rest[8:]
        assert inputs.m_initial is not None
        end = SliceEnd(ctx.border, inputs.m_initial, m_leaving)
        found = ctx.form.gradients(ComputedSlice(q, inputs, h, tuple(kept)), grad_h, (grad_C, grad_n), end)
        of_before: list[Tensor | None] = [None, None]
        if ctx.dtypes_before is not None:
            # All ranks are given the state before the sequence; the first one's is that of the gradient.
            of_before = [
                (x if ctx.border.is_first else torch.zeros_like(x)).to(dtype)
                for x, dtype in zip((found.C_initial, found.n_initial), ctx.dtypes_before, strict=True)
            ]
        gates = (found.igate_preact.to(inputs.igate_preact.dtype), found.fgate_preact.to(inputs.fgate_preact.dtype))
        return None, None, *of_before, found.q, found.k, found.v, *gates, None, None, None, None

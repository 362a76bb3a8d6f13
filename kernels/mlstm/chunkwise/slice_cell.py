"""A slice of a sequence by the Triton kernels: a kernels.mlstm.slice_cell.SliceForm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.mlstm.border import SliceEnd
from kernels.mlstm.chunkwise.cell import readable_inputs
from kernels.mlstm.chunkwise.launch import Ends
from kernels.mlstm.chunkwise.op import Kept, cell_gradients, mlstm_chunkwise, readable, without_gaps
from kernels.mlstm.inputs import CellGradients, CellInputs, CellSettings
from kernels.mlstm.slice_cell import ComputedSlice, StateGradient
from kernels.mlstm.state import MLSTMState


@dataclass(frozen=True)
class TritonSlice:
    settings: CellSettings

    def run(self, q: Tensor, inputs: CellInputs) -> tuple[Tensor, MLSTMState, tuple[Tensor | None, ...]]:
        results = mlstm_chunkwise(readable(q), readable_inputs(inputs), self.settings, True, True)
        matrices, vectors = results.matrices, results.vectors
        kept = (results.packed, results.chunk_decay, results.query_normaliser, matrices, vectors)
        return results.h, MLSTMState(results.C, results.n, results.m), kept

    def gradients(
        self, computed: ComputedSlice, grad_h: Tensor | None, grad_end: StateGradient, end: SliceEnd
    ) -> CellGradients:
        q, inputs, h, (packed, chunk_decay, query_normaliser, matrices, vectors) = computed
        assert packed is not None and chunk_decay is not None and query_normaliser is not None
        grad_h = torch.zeros_like(h) if grad_h is None else readable(grad_h.to(h.dtype))
        own_end = Ends(*grad_end)
        if any(grad is not None for grad in own_end):
            own_end = without_gaps(own_end, inputs)
        kept = Kept(packed, chunk_decay, query_normaliser, matrices, vectors)
        return cell_gradients(grad_h, own_end, readable(q), readable_inputs(inputs), h, kept, self.settings, end)

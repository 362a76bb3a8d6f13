"""Launches of the forward kernels of the chunkwise mLSTM, in their order.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension, BH batch times heads, NC chunks, L tokens of
a chunk; SP = NC * L, the sequence padded to whole chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.integers import ceil_div, next_power_of_two
from kernels.mlstm.accounting import WEIGHT_ROWS
from kernels.mlstm.chunkwise.gates import chunk_totals_kernel, weights_kernel
from kernels.mlstm.chunkwise.problem import Documents, Problem, strides
from kernels.mlstm.chunkwise.read_out import read_out_kernel
from kernels.mlstm.chunkwise.scores import scores_kernel
from kernels.mlstm.chunkwise.states import states_kernel, weigh_kernel
from kernels.mlstm.inputs import CellInputs


def float32_contiguous(state: Tensor | None) -> Tensor | None:
    """A part of a state as the kernels read it."""
    return None if state is None else state.float().contiguous()


def nothing(like: Tensor, count: int) -> list[Tensor]:
    """Tensors in the place of results that were not asked for: operators return no None, nor shared memory."""
    return [like.new_empty(0, dtype=torch.float32) for _ in range(count)]


class Weights(NamedTuple):
    """packed [7, BH, SP] (the rows of gates.py), decay of each chunk [BH, NC], the last m [B, NH]; all float32."""

    packed: Tensor
    chunk_decay: Tensor
    m: Tensor


def weights(problem: Problem, inputs: CellInputs, documents: Documents, m_before: float) -> Weights:
    """What depends on the gates alone; m_before is the stabiliser to start from where there is no initial state."""
    igate_preact, fgate_preact = inputs.igate_preact, inputs.fgate_preact
    device = igate_preact.device
    m_initial = float32_contiguous(inputs.m_initial)
    packed = torch.empty(WEIGHT_ROWS, problem.sequences, problem.padded, dtype=torch.float32, device=device)
    chunk_decay = torch.empty(problem.sequences, problem.chunks, dtype=torch.float32, device=device)
    m_final = torch.empty(problem.batch, problem.heads, dtype=torch.float32, device=device)
    grid = (problem.sequences * problem.chunks,)
    totals = torch.empty(3, *chunk_decay.shape, dtype=torch.float64, device=device)
    sizes = (problem.length, problem.heads, problem.chunks, chunk_decay.numel())
    constants = {
        "HAS_STARTS": documents.start is not None,
        "EXPONENTIAL": problem.exponential,
        "L": problem.tiles.chunk,
        "num_warps": 2,
    }
    chunk_totals_kernel[grid](igate_preact, fgate_preact, documents.start, totals, *sizes, **constants)
    weights_kernel[grid](
        igate_preact,
        fgate_preact,
        documents.start,
        m_initial,
        totals,
        packed,
        chunk_decay,
        m_final,
        *sizes,
        problem.row_stride,
        HAS_INITIAL=m_initial is not None,
        M_BEFORE=m_before,
        **constants,
    )
    return Weights(packed, chunk_decay, m_final)


class Factors(NamedTuple):
    """What the recurrence between chunks adds up: outer products of x [B, S, NH, DK] and y [B, S, NH, DV].

    matrix_weight and vector_weight [BH, SP] float32: weight of each token in the matrix, of its x in the vector.
    """

    x: Tensor
    y: Tensor
    matrix_weight: Tensor
    vector_weight: Tensor


class Ends(NamedTuple):
    """A state at one end of the sequence: matrix [B, NH, DK, DV] and vector [B, NH, DK], both None for zeros."""

    matrix: Tensor | None
    vector: Tensor | None


@dataclass
class States:
    """What the recurrence between chunks leaves: before each chunk (in its direction), and behind the last.

    matrices [BH, NC, DK, DV] in the inputs' precision, vectors [BH, NC, DK] float32, matrix [B, NH, DK, DV] and
    vector [B, NH, DK] float32; None where not asked for.
    """

    matrices: Tensor | None
    vectors: Tensor | None
    matrix: Tensor | None
    vector: Tensor | None

    def at_chunks(self) -> tuple[Tensor, Tensor]:
        """matrices and vectors, which were asked for."""
        assert self.matrices is not None and self.vectors is not None
        return self.matrices, self.vectors

    def behind(self) -> tuple[Tensor, Tensor]:
        """matrix and vector, which were asked for."""
        assert self.matrix is not None and self.vector is not None
        return self.matrix, self.vector


def states(
    problem: Problem,
    factors: Factors,
    chunk_decay: Tensor,
    before: Ends,
    *,
    backwards: bool = False,
    store_chunks: bool = True,
    store_after: bool = False,
) -> States:
    """Run the recurrence from the state `before`."""
    x, y, matrix_weight, vector_weight = factors
    before = Ends(float32_contiguous(before.matrix), float32_contiguous(before.vector))
    tile = problem.tiles.states
    sequences, chunks, key_dim, value_dim = problem.sequences, problem.chunks, problem.key_dim, problem.value_dim
    result = States(None, None, None, None)
    if store_chunks:
        result.matrices = x.new_empty(sequences, chunks, key_dim, value_dim)
        result.vectors = x.new_empty(sequences, chunks, key_dim, dtype=torch.float32)
    if store_after:
        result.matrix = x.new_empty(problem.batch, problem.heads, key_dim, value_dim, dtype=torch.float32)
        result.vector = x.new_zeros(problem.batch, problem.heads, key_dim, dtype=torch.float32)
    weighed = x.new_empty(sequences, problem.padded, key_dim)
    sums = x.new_empty(sequences, chunks, key_dim, dtype=torch.float32)
    width = min(64, max(16, next_power_of_two(key_dim)))
    weigh_kernel[(ceil_div(key_dim, width) * chunks * sequences,)](
        x,
        matrix_weight,
        vector_weight,
        weighed,
        sums,
        problem.length,
        problem.heads,
        chunks,
        *strides(x),
        DX=key_dim,
        L=problem.tiles.chunk,
        BX=width,
        BT=min(128, problem.tiles.chunk),
        VECTOR=problem.normaliser,
        num_warps=4,
    )
    grid = (ceil_div(key_dim, tile.rows) * ceil_div(value_dim, tile.columns) * sequences,)
    states_kernel[grid](
        weighed,
        sums,
        y,
        chunk_decay,
        before.matrix,
        before.vector,
        result.matrices,
        result.vectors,
        result.matrix,
        result.vector,
        problem.length,
        problem.heads,
        chunks,
        *strides(y),
        DX=key_dim,
        DY=value_dim,
        L=problem.tiles.chunk,
        BX=tile.rows,
        BY=tile.columns,
        BT=tile.tokens,
        BACKWARDS=backwards,
        VECTOR=problem.normaliser,
        HAS_BEFORE=before.matrix is not None,
        STORE_CHUNKS=store_chunks,
        STORE_AFTER=store_after,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return result


def scores(
    problem: Problem, q: Tensor, k: Tensor, packed: Tensor, vectors: Tensor, documents: Documents
) -> tuple[Tensor, Tensor]:
    """What each token reads of each other one of its chunk [BH, SP, L], and n^T q / sqrt(DK) [BH, SP] float32."""
    tiles, tile = problem.tiles, problem.tiles.scores
    scores = q.new_empty(problem.sequences, problem.padded, tiles.chunk)
    query_normaliser = q.new_empty(problem.sequences, problem.padded, dtype=torch.float32)
    scores_kernel[problem.grid(tile)](
        q,
        k,
        packed,
        vectors,
        documents.number,
        scores,
        query_normaliser,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        *strides(q),
        *strides(k),
        SCALE=problem.scale,
        DK=problem.key_dim,
        L=tiles.chunk,
        BM=tile.rows,
        BN=tile.columns,
        BD=tile.inner,
        NORMALISER=problem.normaliser,
        HAS_STARTS=documents.number is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return scores, query_normaliser


def read_out(
    problem: Problem,
    q: Tensor,
    v: Tensor,
    packed: Tensor,
    query_normaliser: Tensor,
    matrices: Tensor,
    scores: Tensor,
) -> Tensor:
    """h [B, S, NH, DV] in v's dtype."""
    h = v.new_empty(v.shape)
    tile = problem.tiles.read_out
    read_out_kernel[problem.grid(tile, problem.value_dim)](
        q,
        v,
        packed,
        query_normaliser,
        matrices,
        scores,
        h,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        problem.settings.eps,
        *strides(q),
        *strides(v),
        SCALE=problem.scale,
        DK=problem.key_dim,
        DV=problem.value_dim,
        L=problem.tiles.chunk,
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.inner,
        BT=tile.tokens,
        NORMALISER=problem.normaliser,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return h

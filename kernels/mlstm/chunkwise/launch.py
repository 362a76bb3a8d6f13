"""Launches of the forward kernels of the chunkwise mLSTM, in their order.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension, BH batch times heads, NC chunks, L tokens of
a chunk; SP = NC * L, the sequence padded to whole chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.mlstm.chunkwise.gates import WEIGHT_ROWS, chunk_totals_kernel, weights_kernel
from kernels.mlstm.chunkwise.problem import Documents, Problem, strides
from kernels.mlstm.chunkwise.read_out import read_out_kernel
from kernels.mlstm.chunkwise.scores import scores_kernel
from kernels.mlstm.chunkwise.states import states_kernel, weigh_kernel
from kernels.triton_support import ceil_div, next_power_of_two


def weights(
    problem: Problem, igate_preact: Tensor, fgate_preact: Tensor, documents: Documents, m_initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed weights [5, BH, SP], decay of each chunk [BH, NC] and the last stabiliser [B, NH]; all float32."""
    options = {"dtype": torch.float32, "device": igate_preact.device}
    packed = torch.empty(WEIGHT_ROWS, problem.sequences, problem.padded, **options)
    chunk_decay = torch.empty(problem.sequences, problem.chunks, **options)
    m_final = torch.empty(problem.batch, problem.heads, **options)
    grid = (problem.sequences * problem.chunks,)
    totals = torch.empty(3, *chunk_decay.shape, dtype=torch.float64, device=igate_preact.device)
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
        **constants,
    )
    return packed, chunk_decay, m_final


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


def states(
    problem: Problem,
    x: Tensor,
    y: Tensor,
    matrix_weight: Tensor,
    vector_weight: Tensor,
    chunk_decay: Tensor,
    before: tuple[Tensor | None, Tensor | None],
    *,
    backwards: bool = False,
    store_chunks: bool = True,
    store_after: bool = False,
) -> States:
    """Run the recurrence over x [B, S, NH, DK] and y [B, S, NH, DV], weighted by [BH, SP], from the state `before`."""
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
        *before,
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
        HAS_BEFORE=before[0] is not None,
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
        problem.eps,
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

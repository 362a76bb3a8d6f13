"""Launches of the backward kernels of the chunkwise mLSTM; the recurrence of the states is that of launch.py.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension, BH batch times heads, NC chunks, L tokens of
a chunk; SP = NC * L, the sequence padded to whole chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.integers import ceil_div, next_power_of_two
from kernels.mlstm.chunkwise.backward import token_gradients_kernel
from kernels.mlstm.chunkwise.gates import gate_gradients_kernel
from kernels.mlstm.chunkwise.launch import States
from kernels.mlstm.chunkwise.problem import Documents, Problem, strides
from kernels.mlstm.chunkwise.read_out import ROW_WEIGHT_ROWS, row_weights_kernel
from kernels.mlstm.chunkwise.scores import score_gradients_kernel
from kernels.mlstm.inputs import CellInputs


def row_weights(problem: Problem, h: Tensor, grad_h: Tensor, packed: Tensor, query_normaliser: Tensor) -> Tensor:
    """[4, BH, SP] float32: the names of kernels.mlstm.chunkwise.read_out."""
    result = packed.new_empty(ROW_WEIGHT_ROWS, problem.sequences, problem.padded)
    rows = min(64, problem.tiles.chunk)
    row_weights_kernel[(problem.padded // rows * problem.sequences,)](
        h,
        grad_h,
        packed,
        query_normaliser,
        result,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        problem.settings.eps,
        *strides(h),
        *strides(grad_h),
        SCALE=problem.scale,
        DV=problem.value_dim,
        L=problem.tiles.chunk,
        BM=rows,
        BD=min(128, next_power_of_two(problem.value_dim)),
        NORMALISER=problem.normaliser,
        num_warps=4,
    )
    return result


def score_gradients(
    problem: Problem,
    q: Tensor,
    inputs: CellInputs,
    grad_h: Tensor,
    packed: Tensor,
    rows: Tensor,
    documents: Documents,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores divided by the denominator and the gradients of q k^T, both [BH, SP, L]; and sums of the gradients of
    the log weights [2 + L / tile rows, BH, SP], see the kernel.
    """
    tiles, tile = problem.tiles, problem.tiles.score_gradients
    k, v = inputs.k, inputs.v
    scores = q.new_empty(problem.sequences, problem.padded, tiles.chunk)
    grad_scores = torch.empty_like(scores)
    weight_sums = packed.new_empty(2 + tiles.chunk // tile.rows, problem.sequences, problem.padded)
    score_gradients_kernel[problem.grid(tile)](
        q,
        k,
        v,
        grad_h,
        packed,
        rows,
        documents.number,
        scores,
        grad_scores,
        weight_sums,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        *strides(q),
        *strides(k),
        *strides(v),
        *strides(grad_h),
        SCALE=problem.scale,
        DK=problem.key_dim,
        DV=problem.value_dim,
        L=tiles.chunk,
        BM=tile.rows,
        BN=tile.columns,
        BD=tile.inner,
        HAS_STARTS=documents.number is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return scores, grad_scores, weight_sums


@dataclass(frozen=True)
class Reading:
    """What read the memory: q [B, S, NH, DK], the gradient of h [B, S, NH, DV], the result of `row_weights`, and the
    first two results of `score_gradients`.
    """

    q: Tensor
    grad_h: Tensor
    row_weights: Tensor
    scores: Tensor
    grad_scores: Tensor


@dataclass
class TokenGradients:
    """q (None if nothing read the memory), k [B, S, NH, DK] and v [B, S, NH, DV]: gradients.

    What the gates' gradients are made of, float32: by tile of columns q . (the memory's part of its gradient) and k
    likewise [tiles, BH, SP], and, in summands, the product of what each chunk leaves of its entering memory with the
    gradient of that [summands, BH, NC].
    """

    q: Tensor | None
    k: Tensor
    v: Tensor
    query_products: Tensor
    key_products: Tensor
    state_products: Tensor


def token_gradients(
    problem: Problem,
    inputs: CellInputs,
    reading: Reading | None,
    packed: Tensor,
    chunk_decay: Tensor,
    entering: States,
    leaving: States,
) -> TokenGradients:
    """entering: the memory before each chunk; leaving: the gradient of the memory behind each."""
    tiles, tile = problem.tiles, problem.tiles.gradients
    k, v = inputs.k, inputs.v
    key_dim, value_dim = problem.key_dim, problem.value_dim
    key_tiles, value_tiles = ceil_div(key_dim, tile.columns), ceil_div(value_dim, tile.columns)
    row_tiles = tiles.chunk // tile.rows
    by_key_tile = (key_tiles, problem.sequences, problem.padded)
    result = TokenGradients(
        q=None if reading is None else k.new_empty(k.shape),
        k=k.new_empty(k.shape),
        v=v.new_empty(v.shape),
        query_products=packed.new_zeros(by_key_tile) if reading is None else packed.new_empty(by_key_tile),
        key_products=packed.new_empty(by_key_tile),
        state_products=packed.new_empty(row_tiles, *chunk_decay.shape),
    )
    jobs = 1 + key_tiles + value_tiles + (0 if reading is None else key_tiles)
    token_gradients_kernel[(jobs * row_tiles * problem.chunks * problem.sequences,)](
        None if reading is None else reading.q,
        k,
        v,
        None if reading is None else reading.grad_h,
        packed,
        None if reading is None else reading.row_weights,
        chunk_decay,
        entering.matrices,
        entering.vectors,
        leaving.matrices,
        leaving.vectors,
        None if reading is None else reading.scores,
        None if reading is None else reading.grad_scores,
        result.q,
        result.k,
        result.v,
        result.query_products,
        result.key_products,
        result.state_products,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        *strides(k if reading is None else reading.q),
        *strides(k),
        *strides(v),
        *strides(v if reading is None else reading.grad_h),
        DK=key_dim,
        DV=value_dim,
        L=tiles.chunk,
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.inner,
        BT=tile.tokens,
        BS=min(512 * tile.warps, next_power_of_two(key_dim * value_dim)),
        NORMALISER=problem.normaliser,
        READ_OUT=reading is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return result


def gate_gradients(
    problem: Problem, weight_sums: Tensor, tokens: TokenGradients, inputs: CellInputs, documents: Documents
) -> tuple[Tensor, Tensor]:
    """Gradients of igate_preact and fgate_preact [B, S, NH], float32."""
    igate_preact, fgate_preact = inputs.igate_preact, inputs.fgate_preact
    grads = [torch.empty_like(gate, dtype=torch.float32) for gate in (igate_preact, fgate_preact)]
    gate_gradients_kernel[(problem.sequences * problem.chunks,)](
        weight_sums,
        tokens.query_products,
        tokens.key_products,
        tokens.state_products,
        igate_preact,
        fgate_preact,
        documents.start,
        *grads,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        SUM_PARTS=len(weight_sums) - 2,
        QUERY_PARTS=len(tokens.query_products),
        KEY_PARTS=len(tokens.key_products),
        STATE_PARTS=len(tokens.state_products),
        HAS_STARTS=documents.start is not None,
        HAS_INITIAL=inputs.C_initial is not None,
        EXPONENTIAL=problem.exponential,
        L=problem.tiles.chunk,
        num_warps=2,
    )
    return grads[0], grads[1]

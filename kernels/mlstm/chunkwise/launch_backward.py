"""Launches of the backward kernels of the chunkwise mLSTM; the recurrence of the states is that of launch.py.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension, BH batch times heads, NC chunks, L tokens of
a chunk; SP = NC * L, the sequence padded to whole chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.mlstm.chunkwise.backward import key_gradient_kernel, query_gradient_kernel, value_gradient_kernel
from kernels.mlstm.chunkwise.gates import gate_gradients_kernel
from kernels.mlstm.chunkwise.launch import States
from kernels.mlstm.chunkwise.problem import Documents, Problem, strides
from kernels.mlstm.chunkwise.read_out import ROW_WEIGHT_ROWS, row_weights_kernel
from kernels.mlstm.chunkwise.scores import score_gradients_kernel
from kernels.mlstm.chunkwise.states import state_products_kernel
from kernels.mlstm.chunkwise.tiles import Tile
from kernels.triton_support import ceil_div, next_power_of_two


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
        problem.eps,
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
    k: Tensor,
    v: Tensor,
    grad_h: Tensor,
    packed: Tensor,
    rows: Tensor,
    documents: Documents,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores divided by the denominator and the gradients of q k^T, both [BH, SP, L]; and sums of the gradients of
    the log weights [2 + L / tile rows, BH, SP], see the kernel.
    """
    tiles, tile = problem.tiles, problem.tiles.score_gradients
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


def query_gradient(
    problem: Problem, q: Tensor, k: Tensor, grad_h: Tensor, rows: Tensor, before: States, grad_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """grad_q [B, S, NH, DK], and by tile of columns q . (the memory's part of grad_q) [tiles, BH, SP] float32."""
    tile = problem.tiles.query_gradient
    grad_q = q.new_empty(q.shape)
    products = rows.new_empty(ceil_div(problem.key_dim, tile.columns), problem.sequences, problem.padded)
    query_gradient_kernel[problem.grid(tile, problem.key_dim)](
        q,
        k,
        grad_h,
        rows,
        before.matrices,
        before.vectors,
        grad_scores,
        grad_q,
        products,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        *strides(q),
        *strides(k),
        *strides(grad_h),
        NORMALISER=problem.normaliser,
        **_block_sizes(problem, tile),
    )
    return grad_q, products


def key_gradient(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, packed: Tensor, behind: States, grad_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """grad_k [B, S, NH, DK], and by tile of columns k . (the memory's part of grad_k) [tiles, BH, SP] float32."""
    tile = problem.tiles.key_gradient
    grad_k = k.new_empty(k.shape)
    products = packed.new_empty(ceil_div(problem.key_dim, tile.columns), problem.sequences, problem.padded)
    key_gradient_kernel[problem.grid(tile, problem.key_dim)](
        q,
        k,
        v,
        packed,
        behind.matrices,
        behind.vectors,
        grad_scores,
        grad_k,
        products,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        *strides(q),
        *strides(k),
        *strides(v),
        NORMALISER=problem.normaliser,
        **_block_sizes(problem, tile),
    )
    return grad_k, products


def value_gradient(
    problem: Problem, k: Tensor, grad_h: Tensor, packed: Tensor, behind: States, scores: Tensor
) -> Tensor:
    """grad_v [B, S, NH, DV]."""
    tile = problem.tiles.value_gradient
    grad_v = k.new_empty(problem.batch, problem.length, problem.heads, problem.value_dim)
    value_gradient_kernel[problem.grid(tile, problem.value_dim)](
        k,
        grad_h,
        packed,
        behind.matrices,
        scores,
        grad_v,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        *strides(k),
        *strides(grad_h),
        **_block_sizes(problem, tile),
    )
    return grad_v


def state_products(problem: Problem, entering: States, leaving: States, chunk_decay: Tensor) -> Tensor:
    """For each chunk the product of what it leaves of the entering memory with the gradient of that: [BH, NC] float32.

    entering: the memory before each chunk; leaving: the gradient of the memory behind each.
    """
    products = torch.empty_like(chunk_decay)
    state_products_kernel[(products.numel(),)](
        entering.matrices,
        entering.vectors,
        leaving.matrices,
        leaving.vectors,
        chunk_decay,
        products,
        DK=problem.key_dim,
        DV=problem.value_dim,
        BLOCK=min(4096, next_power_of_two(problem.key_dim * problem.value_dim)),
        BLOCK_DK=next_power_of_two(problem.key_dim),
        NORMALISER=problem.normaliser,
        num_warps=8,
    )
    return products


def gate_gradients(
    problem: Problem,
    weight_sums: Tensor,
    query_products: Tensor,
    key_products: Tensor,
    state_products: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    documents: Documents,
    has_initial: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of igate_preact and fgate_preact [B, S, NH], float32."""
    grads = [torch.empty_like(gate, dtype=torch.float32) for gate in (igate_preact, fgate_preact)]
    gate_gradients_kernel[(problem.sequences * problem.chunks,)](
        weight_sums,
        query_products,
        key_products,
        state_products,
        igate_preact,
        fgate_preact,
        documents.start,
        *grads,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        SUM_PARTS=len(weight_sums) - 2,
        QUERY_PARTS=len(query_products),
        KEY_PARTS=len(key_products),
        HAS_STARTS=documents.start is not None,
        HAS_INITIAL=has_initial,
        EXPONENTIAL=problem.exponential,
        L=problem.tiles.chunk,
        num_warps=2,
    )
    return grads[0], grads[1]


def _block_sizes(problem: Problem, tile: Tile) -> dict[str, int]:
    """The constants of the three gradient kernels."""
    return {
        "DK": problem.key_dim,
        "DV": problem.value_dim,
        "L": problem.tiles.chunk,
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.inner,
        "BT": tile.tokens,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }

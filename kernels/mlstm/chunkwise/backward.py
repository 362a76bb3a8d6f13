"""Gradients of queries, keys and values: each is one product with a chunk's state and one inside the chunk.

Axes: S sequence, DK query/key and DV value dimension, L tokens of a chunk, NC chunks, BM x BN the tile of a program,
BK head dimensions and BT tokens that one step takes.
"""

import triton
import triton.language as tl

from kernels.mlstm.chunkwise.products import add_product, locate_tile


@triton.jit(do_not_specialize=["S", "NH", "NC", "row_stride"])
def query_gradient_kernel(
    q,
    k,
    grad_h,
    row_weights,
    matrices,
    vectors,
    grad_scores,
    grad_q,
    products,
    S,
    NH,
    NC,
    row_stride,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    g_stride_b,
    g_stride_s,
    g_stride_h,
    DK: tl.constexpr,
    DV: tl.constexpr,
    L: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    NORMALISER: tl.constexpr,
):
    """grad_q = matrix_weight * grad_h C^T + vector_weight * n + grad_scores k; products = q . (its first two terms).

    `matrices` and `vectors` are the memory that enters each chunk; products [tiles of DK, BH, NC * L] float32.
    """
    tiles_n: tl.constexpr = (DK + BN - 1) // BN
    column_tile, first_row, chunk, chunk_start, batch, head, bh = locate_tile(tl.program_id(0), NH, NC, tiles_n, L, BM)
    first_column = column_tile * BN
    row_stride = row_stride.to(tl.int64)
    k += batch * k_stride_b + head * k_stride_h + chunk_start.to(tl.int64) * k_stride_s + first_column
    grad_h += batch * g_stride_b + head * g_stride_h + first_row.to(tl.int64) * g_stride_s
    matrices += (bh * NC + chunk) * DK * DV + first_column * DV
    grad_scores += (bh * NC * L + first_row) * L
    rows = first_row + tl.arange(0, BM)
    columns = first_column + tl.arange(0, BN)
    here = bh * NC * L + rows
    grad = tl.zeros([BM, BN], dtype=tl.float32)
    grad = add_product(
        grad, grad_h, g_stride_s, 1, S - first_row, matrices, 1, DV, DK - first_column,
        DV, BM, BN, BK, DV % BK != 0, DK % BN != 0,
    )  # fmt: skip
    grad *= tl.load(row_weights + 2 * row_stride + here)[:, None]
    if NORMALISER:
        vector = tl.load(vectors + (bh * NC + chunk) * DK + columns, mask=columns < DK, other=0.0)
        grad += tl.load(row_weights + 3 * row_stride + here)[:, None] * vector[None, :]
    inside = (rows < S)[:, None] & (columns < DK)[None, :]
    token = rows.to(tl.int64)[:, None]
    query = tl.load(
        q + batch * q_stride_b + head * q_stride_h + token * q_stride_s + columns[None, :], mask=inside, other=0.0
    )
    products += column_tile.to(tl.int64) * row_stride
    tl.store(products + here, tl.sum(query.to(tl.float32) * grad, axis=1))
    grad = add_product(
        grad, grad_scores, L, 1, BM, k, k_stride_s, 1, DK - first_column,
        tl.minimum(first_row + BM, S) - chunk_start, BM, BN, BT, True, DK % BN != 0,
    )  # fmt: skip
    place = grad_q + ((batch * S + token) * NH + head) * DK + columns[None, :]
    tl.store(place, grad.to(grad_q.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["S", "NH", "NC", "row_stride"])
def key_gradient_kernel(
    q,
    k,
    v,
    weights,
    grad_matrices,
    grad_vectors,
    grad_scores,
    grad_k,
    products,
    S,
    NH,
    NC,
    row_stride,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    DK: tl.constexpr,
    DV: tl.constexpr,
    L: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    NORMALISER: tl.constexpr,
):
    """grad_k = added * (v dC^T + dn) + grad_scores^T q; products = k . (its first term).

    grad_matrices and grad_vectors belong to the memory that leaves each chunk.
    """
    tiles_n: tl.constexpr = (DK + BN - 1) // BN
    column_tile, first_row, chunk, chunk_start, batch, head, bh = locate_tile(tl.program_id(0), NH, NC, tiles_n, L, BM)
    first_column = column_tile * BN
    row_stride = row_stride.to(tl.int64)
    q += batch * q_stride_b + head * q_stride_h + first_row.to(tl.int64) * q_stride_s + first_column
    v += batch * v_stride_b + head * v_stride_h + first_row.to(tl.int64) * v_stride_s
    grad_matrices += (bh * NC + chunk) * DK * DV + first_column * DV
    grad_scores += (bh * NC * L + first_row) * L + (first_row - chunk_start)
    rows = first_row + tl.arange(0, BM)
    columns = first_column + tl.arange(0, BN)
    here = bh * NC * L + rows
    grad = tl.zeros([BM, BN], dtype=tl.float32)
    grad = add_product(
        grad, v, v_stride_s, 1, S - first_row, grad_matrices, 1, DV, DK - first_column,
        DV, BM, BN, BK, DV % BK != 0, DK % BN != 0,
    )  # fmt: skip
    if NORMALISER:
        grad += tl.load(grad_vectors + (bh * NC + chunk) * DK + columns, mask=columns < DK, other=0.0)[None, :]
    grad *= tl.load(weights + 3 * row_stride + here)[:, None]
    inside = (rows < S)[:, None] & (columns < DK)[None, :]
    token = rows.to(tl.int64)[:, None]
    key = tl.load(
        k + batch * k_stride_b + head * k_stride_h + token * k_stride_s + columns[None, :], mask=inside, other=0.0
    )
    products += column_tile.to(tl.int64) * row_stride
    tl.store(products + here, tl.sum(key.to(tl.float32) * grad, axis=1))
    grad = add_product(
        grad, grad_scores, 1, L, BM, q, q_stride_s, 1, DK - first_column,
        tl.minimum(chunk_start + L, S) - first_row, BM, BN, BT, True, DK % BN != 0,
    )  # fmt: skip
    place = grad_k + ((batch * S + token) * NH + head) * DK + columns[None, :]
    tl.store(place, grad.to(grad_k.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["S", "NH", "NC", "row_stride"])
def value_gradient_kernel(
    k,
    grad_h,
    weights,
    grad_matrices,
    scores,
    grad_v,
    S,
    NH,
    NC,
    row_stride,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    g_stride_b,
    g_stride_s,
    g_stride_h,
    DK: tl.constexpr,
    DV: tl.constexpr,
    L: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    """grad_v = added * k dC + scores^T grad_h, the scores divided by the denominator."""
    tiles_n: tl.constexpr = (DV + BN - 1) // BN
    column_tile, first_row, chunk, chunk_start, batch, head, bh = locate_tile(tl.program_id(0), NH, NC, tiles_n, L, BM)
    first_column = column_tile * BN
    row_stride = row_stride.to(tl.int64)
    k += batch * k_stride_b + head * k_stride_h + first_row.to(tl.int64) * k_stride_s
    grad_h += batch * g_stride_b + head * g_stride_h + first_row.to(tl.int64) * g_stride_s + first_column
    grad_matrices += (bh * NC + chunk) * DK * DV + first_column
    scores += (bh * NC * L + first_row) * L + (first_row - chunk_start)
    rows = first_row + tl.arange(0, BM)
    columns = first_column + tl.arange(0, BN)
    grad = tl.zeros([BM, BN], dtype=tl.float32)
    grad = add_product(
        grad, k, k_stride_s, 1, S - first_row, grad_matrices, DV, 1, DV - first_column,
        DK, BM, BN, BK, DK % BK != 0, DV % BN != 0,
    )  # fmt: skip
    grad *= tl.load(weights + 3 * row_stride + bh * NC * L + rows)[:, None]
    grad = add_product(
        grad, scores, 1, L, BM, grad_h, g_stride_s, 1, DV - first_column,
        tl.minimum(chunk_start + L, S) - first_row, BM, BN, BT, True, DV % BN != 0,
    )  # fmt: skip
    place = grad_v + ((batch * S + rows.to(tl.int64)[:, None]) * NH + head) * DV + columns[None, :]
    tl.store(place, grad.to(grad_v.dtype.element_ty), mask=(rows < S)[:, None] & (columns < DV)[None, :])

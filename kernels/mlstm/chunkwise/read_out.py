"""The read-out: h = (carry * q C + scores v) / denominator, and backwards, what its denominator does to each row.

Axes: S sequence, DK query/key and DV value dimension, L tokens of a chunk, NC chunks, BM x BN the tile of a program,
BK inner positions that one step takes.
"""

import triton
import triton.language as tl

from kernels.mlstm.chunkwise.products import add_product, locate_tile

# Rows of the packed row weights: 1 / denominator; gradient of n^T q / sqrt(DK); and the weights with which a token's
# query enters the gradients of the memory's matrix and vector.
INVERSE_DENOMINATOR, GRAD_NORMALISER, MATRIX_WEIGHT, VECTOR_WEIGHT = range(4)
ROW_WEIGHT_ROWS = 4


@triton.jit(do_not_specialize=["S", "NH", "NC", "row_stride"])
def read_out_kernel(
    q,
    v,
    weights,
    query_normaliser,
    matrices,
    scores,
    h,
    S,
    NH,
    NC,
    row_stride,
    eps,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    SCALE: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    L: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    NORMALISER: tl.constexpr,
):
    """h [B, S, NH, DV]. One program for each BM tokens and BN columns of a sequence and head."""
    tiles_n: tl.constexpr = (DV + BN - 1) // BN
    column_tile, first_row, chunk, chunk_start, batch, head, bh = locate_tile(tl.program_id(0), NH, NC, tiles_n, L, BM)
    first_column = column_tile * BN
    row_stride = row_stride.to(tl.int64)
    q += batch * q_stride_b + head * q_stride_h + first_row.to(tl.int64) * q_stride_s
    v += batch * v_stride_b + head * v_stride_h + chunk_start.to(tl.int64) * v_stride_s + first_column
    matrices += (bh * NC + chunk) * DK * DV + first_column
    scores += (bh * NC * L + first_row) * L
    rows = first_row + tl.arange(0, BM)
    columns = first_column + tl.arange(0, BN)
    here = bh * NC * L + rows
    result = tl.zeros([BM, BN], dtype=tl.float32)
    result = add_product(
        result, q, q_stride_s, 1, S - first_row, matrices, DV, 1, DV - first_column,
        DK, BM, BN, BK, DK % BK != 0, DV % BN != 0,
    )  # fmt: skip
    result *= (tl.load(weights + 2 * row_stride + here) * SCALE)[:, None]
    result = add_product(
        result, scores, L, 1, BM, v, v_stride_s, 1, DV - first_column,
        tl.minimum(first_row + BM, S) - chunk_start, BM, BN, BT, True, DV % BN != 0,
    )  # fmt: skip
    if NORMALISER:
        floor = tl.load(weights + 4 * row_stride + here)
        denominator = tl.maximum(tl.abs(tl.load(query_normaliser + here)), floor) + eps
        result = result / denominator[:, None]
    place = h + ((batch * S + rows.to(tl.int64)) * NH + head)[:, None] * DV + columns[None, :]
    tl.store(place, result.to(h.dtype.element_ty), mask=(rows < S)[:, None] & (columns < DV)[None, :])


@triton.jit(do_not_specialize=["S", "NH", "NC", "row_stride"])
def row_weights_kernel(
    h,
    grad_h,
    weights,
    query_normaliser,
    row_weights,
    S,
    NH,
    NC,
    row_stride,
    eps,
    h_stride_b,
    h_stride_s,
    h_stride_h,
    g_stride_b,
    g_stride_s,
    g_stride_h,
    SCALE: tl.constexpr,
    DV: tl.constexpr,
    L: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    NORMALISER: tl.constexpr,
):
    """row_weights [4, BH, NC * L], see the names above; h . grad_h is what the denominator's gradient needs."""
    _, first_row, _, _, batch, head, bh = locate_tile(tl.program_id(0), NH, NC, 1, L, BM)
    row_stride = row_stride.to(tl.int64)
    rows = first_row + tl.arange(0, BM)
    here = bh * NC * L + rows
    carry = tl.load(weights + 2 * row_stride + here) * SCALE
    inverse = tl.full([BM], 1.0, dtype=tl.float32)
    grad_normaliser = tl.zeros([BM], dtype=tl.float32)
    if NORMALISER:
        h += batch * h_stride_b + head * h_stride_h
        grad_h += batch * g_stride_b + head * g_stride_h
        product = tl.zeros([BM], dtype=tl.float32)
        for first in tl.static_range(0, DV, BD):
            d = first + tl.arange(0, BD)
            inside = (rows < S)[:, None] & (d < DV)[None, :]
            h_here = tl.load(h + rows.to(tl.int64)[:, None] * h_stride_s + d[None, :], mask=inside, other=0.0)
            g_here = tl.load(grad_h + rows.to(tl.int64)[:, None] * g_stride_s + d[None, :], mask=inside, other=0.0)
            product += tl.sum(h_here.to(tl.float32) * g_here.to(tl.float32), axis=1)
        normaliser = tl.load(query_normaliser + here)
        floor = tl.load(weights + 4 * row_stride + here)
        inverse = 1.0 / (tl.maximum(tl.abs(normaliser), floor) + eps)
        # At the floor the denominator does not depend on the query.
        sign = tl.where(normaliser > floor, 1.0, 0.0) - tl.where(normaliser < -floor, 1.0, 0.0)
        grad_normaliser = -product * inverse * sign
    tl.store(row_weights + here, inverse)
    tl.store(row_weights + row_stride + here, grad_normaliser)
    tl.store(row_weights + 2 * row_stride + here, carry * inverse)
    tl.store(row_weights + 3 * row_stride + here, carry * grad_normaliser)

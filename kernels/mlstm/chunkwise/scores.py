"""Inside a chunk: how much each token reads of each earlier one, and backwards, the gradients of those weights.

Writing these L x L blocks costs little beside the states, and what follows is then nothing but matrix products.

Axes: S sequence, DK query/key and DV value dimension, L tokens of a chunk, NC chunks, BM x BN the tile of a program,
BD head dimensions that one step takes.
"""

import triton
import triton.language as tl

from kernels.mlstm.chunkwise.products import add_product, decay_weights, locate_tile


@triton.jit(do_not_specialize=["S", "NH", "NC", "row_stride"])
def scores_kernel(
    q,
    k,
    weights,
    normalisers,
    document,
    scores,
    query_normaliser,
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
    SCALE: tl.constexpr,
    DK: tl.constexpr,
    L: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    NORMALISER: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """scores [BH, NC * L, L] = (q k^T / sqrt(DK)) * decay, and query_normaliser [BH, NC * L] = n^T q / sqrt(DK).

    One program for each BM rows of a sequence and head.
    """
    _, first_row, chunk, chunk_start, batch, head, bh = locate_tile(tl.program_id(0), NH, NC, 1, L, BM)
    row_stride = row_stride.to(tl.int64)
    q += batch * q_stride_b + head * q_stride_h + first_row.to(tl.int64) * q_stride_s
    k += batch * k_stride_b + head * k_stride_h + chunk_start.to(tl.int64) * k_stride_s
    weights += bh * NC * L
    if HAS_STARTS:
        document += batch * S
    scores += (bh * NC * L + first_row) * L
    rows = first_row + tl.arange(0, BM)
    total = tl.zeros([BM], dtype=tl.float32)
    if NORMALISER:
        local = tl.arange(0, BM)
        normaliser = normalisers + (bh * NC + chunk) * DK
        for first in tl.range(0, DK, BD, num_stages=3):
            d = first + tl.arange(0, BD)
            inside = (rows < S)[:, None] & (d < DK)[None, :]
            query = tl.load(q + local[:, None] * q_stride_s + d[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(query * tl.load(normaliser + d, mask=d < DK, other=0.0)[None, :], axis=1)
        total *= tl.load(weights + 2 * row_stride + rows) * SCALE
    place = scores + tl.arange(0, BM)[:, None] * L + tl.arange(0, BN)[None, :]
    live = tl.cdiv(first_row - chunk_start + BM, BN) * BN
    for first in range(0, live, BN):
        columns = chunk_start + first + tl.arange(0, BN)
        product = tl.zeros([BM, BN], dtype=tl.float32)
        product = add_product(
            product, q, q_stride_s, 1, S - first_row, k + first * k_stride_s, 1, k_stride_s, S - chunk_start - first,
            DK, BM, BN, BD, DK % BD != 0, True,
        )  # fmt: skip
        decay = decay_weights(weights, row_stride, document, rows, columns, S, HAS_STARTS)
        score = product * SCALE * decay
        if NORMALISER:
            total += tl.sum(score, axis=1)
        tl.store(place + first, score.to(scores.dtype.element_ty))
    for first in range(live, L, BN):
        tl.store(place + first, tl.zeros([BM, BN], dtype=scores.dtype.element_ty))
    if NORMALISER:
        tl.store(query_normaliser + bh * NC * L + rows, total)


@triton.jit(do_not_specialize=["S", "NH", "NC", "row_stride"])
def score_gradients_kernel(
    q,
    k,
    v,
    grad_h,
    weights,
    row_weights,
    document,
    scores,
    grad_scores,
    weight_sums,
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
    g_stride_b,
    g_stride_s,
    g_stride_h,
    SCALE: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    L: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """scores [BH, NC * L, L] divided by the read-out's denominator, and grad_scores: the gradient of q k^T.

    row_weights: row 0 is 1 / denominator, row 1 the gradient of n^T q / sqrt(DK) (kernels of read_out.py).
    weight_sums [2 + L / BM, BH, NC * L] float32: of the gradient of the log weights, row 0 the diagonal, row 1 the sums
    over earlier columns, and the others, one for each tile of rows of the chunk, the sums over its later rows. Apart
    from the diagonal, which no forget gate has a part in, so that it does not drown what they have a part in.
    """
    _, first_row, chunk, chunk_start, batch, head, bh = locate_tile(tl.program_id(0), NH, NC, 1, L, BM)
    row_stride = row_stride.to(tl.int64)
    q += batch * q_stride_b + head * q_stride_h + first_row.to(tl.int64) * q_stride_s
    grad_h += batch * g_stride_b + head * g_stride_h + first_row.to(tl.int64) * g_stride_s
    k += batch * k_stride_b + head * k_stride_h + chunk_start.to(tl.int64) * k_stride_s
    v += batch * v_stride_b + head * v_stride_h + chunk_start.to(tl.int64) * v_stride_s
    weights += bh * NC * L
    if HAS_STARTS:
        document += batch * S
    row_weights += bh * NC * L
    block = (bh * NC * L + first_row) * L
    rows = first_row + tl.arange(0, BM)
    weight_sums += bh * NC * L
    part = (first_row - chunk_start) // BM
    diagonal = tl.zeros([BM], dtype=tl.float32)
    row_sum = tl.zeros([BM], dtype=tl.float32)
    inverse_denominator = tl.load(row_weights + rows)
    grad_normaliser = tl.load(row_weights + row_stride + rows)
    place = block + tl.arange(0, BM)[:, None] * L + tl.arange(0, BN)[None, :]
    live = tl.cdiv(first_row - chunk_start + BM, BN) * BN
    for first in range(0, live, BN):
        columns = chunk_start + first + tl.arange(0, BN)
        product = tl.zeros([BM, BN], dtype=tl.float32)
        product = add_product(
            product, q, q_stride_s, 1, S - first_row, k + first * k_stride_s, 1, k_stride_s, S - chunk_start - first,
            DK, BM, BN, BD, DK % BD != 0, True,
        )  # fmt: skip
        grad = tl.zeros([BM, BN], dtype=tl.float32)
        grad = add_product(
            grad, grad_h, g_stride_s, 1, S - first_row, v + first * v_stride_s, 1, v_stride_s, S - chunk_start - first,
            DV, BM, BN, BD, DV % BD != 0, True,
        )  # fmt: skip
        decay = decay_weights(weights, row_stride, document, rows, columns, S, HAS_STARTS) * SCALE
        score = product * decay * inverse_denominator[:, None]
        grad = (grad * inverse_denominator[:, None] + grad_normaliser[:, None]) * decay
        grad_log = product * grad
        is_diagonal = rows[:, None] == columns[None, :]
        diagonal += tl.sum(tl.where(is_diagonal, grad_log, 0.0), axis=1)
        grad_log = tl.where(is_diagonal, 0.0, grad_log)
        row_sum += tl.sum(grad_log, axis=1)
        tl.store(weight_sums + (2 + part) * row_stride + columns, tl.sum(grad_log, axis=0))
        tl.store(scores + place + first, score.to(scores.dtype.element_ty))
        tl.store(grad_scores + place + first, grad.to(grad_scores.dtype.element_ty))
    for first in range(live, L, BN):
        nothing = tl.zeros([BM, BN], dtype=scores.dtype.element_ty)
        tl.store(scores + place + first, nothing)
        tl.store(grad_scores + place + first, nothing)
        columns = chunk_start + first + tl.arange(0, BN)
        tl.store(weight_sums + (2 + part) * row_stride + columns, tl.zeros([BN], dtype=tl.float32))
    tl.store(weight_sums + rows, diagonal)
    tl.store(weight_sums + row_stride + rows, row_sum)

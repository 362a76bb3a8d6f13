"""Gradients of queries, keys and values, and the products of states that the gates' gradients need: in one launch.

Programs that work on the same chunk are neighbours, so that the states, activations and scores that they share come
from memory once and from the L2 cache then.

Axes: S sequence, DK query/key and DV value dimension, L tokens of a chunk, NC chunks, BM x BN the tile of a program,
BK head dimensions and BT tokens that one step takes, BS entries of a state.
"""

import triton
import triton.language as tl

from kernels.mlstm.chunkwise.products import add_product, locate_tile


@triton.jit
def _token_gradient(
    upstream,
    upstream_stride,
    matrix,
    matrix_inner_stride,
    matrix_column_stride,
    matrix_weight,
    vector,
    vector_weight,
    own,
    own_stride,
    products,
    block,
    block_row_stride,
    block_inner_stride,
    others,
    others_stride,
    others_end,
    result,
    result_stride,
    row_end,
    first_column,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    VECTOR: tl.constexpr,
    PRODUCTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """result = matrix_weight * upstream @ matrix + vector_weight * vector + block @ others, BN columns of WIDTH.

    products: of `own` with the first two terms, by row. Without BLOCK there is no third term. Pointers are at the first
    of BM rows, and of all columns.
    """
    rows = tl.arange(0, BM)
    columns = first_column + tl.arange(0, BN)
    column_end = WIDTH - first_column
    grad = tl.zeros([BM, BN], dtype=tl.float32)
    grad = add_product(
        grad, upstream, upstream_stride, 1, row_end,
        matrix + first_column * matrix_column_stride, matrix_inner_stride, matrix_column_stride, column_end,
        INNER, BM, BN, BK, INNER % BK != 0, WIDTH % BN != 0,
    )  # fmt: skip
    grad *= tl.load(matrix_weight + rows)[:, None]
    if VECTOR:
        part = tl.load(vector + columns, mask=columns < WIDTH, other=0.0)
        grad += tl.load(vector_weight + rows)[:, None] * part[None, :]
    inside = (rows < row_end)[:, None] & (columns < WIDTH)[None, :]
    row = rows.to(tl.int64)[:, None]
    if PRODUCTS:
        own_here = tl.load(own + row * own_stride + columns[None, :], mask=inside, other=0.0)
        tl.store(products + rows, tl.sum(own_here.to(tl.float32) * grad, axis=1))
    if BLOCK:
        grad = add_product(
            grad, block, block_row_stride, block_inner_stride, BM, others + first_column, others_stride, 1, column_end,
            others_end, BM, BN, BT, True, WIDTH % BN != 0,
        )  # fmt: skip
    tl.store(result + row * result_stride + columns[None, :], grad.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _state_product(
    matrix,
    vector,
    grad_matrix,
    grad_vector,
    part,
    PARTS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BS: tl.constexpr,
    NORMALISER: tl.constexpr,
):
    """One of PARTS summands of the product of a state with a gradient."""
    size: tl.constexpr = (DK * DV + PARTS - 1) // PARTS
    end = tl.minimum((part + 1) * size, DK * DV)
    total = tl.zeros([BS], dtype=tl.float32)
    # Nothing but loads: without stages of its own, each step would wait for its loads before the next asks for any.
    for first in tl.range(0, size, BS, num_stages=4):
        place = part * size + first + tl.arange(0, BS)
        here = tl.load(matrix + place, mask=place < end, other=0.0).to(tl.float32)
        total += here * tl.load(grad_matrix + place, mask=place < end, other=0.0).to(tl.float32)
    product = tl.sum(total, axis=0)
    if NORMALISER:
        width: tl.constexpr = triton.next_power_of_2(DK)
        dk = tl.arange(0, width)
        inside = (dk < DK) & (part == 0)
        here = tl.load(vector + dk, mask=inside, other=0.0)
        product += tl.sum(here * tl.load(grad_vector + dk, mask=inside, other=0.0), axis=0)
    return product


@triton.jit(do_not_specialize=["S", "NH", "NC", "row_stride"])
def token_gradients_kernel(
    q,
    k,
    v,
    grad_h,
    weights,
    row_weights,
    chunk_decay,
    matrices,
    vectors,
    grad_matrices,
    grad_vectors,
    scores,
    grad_scores,
    grad_q,
    grad_k,
    grad_v,
    query_products,
    key_products,
    state_products,
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
    DK: tl.constexpr,
    DV: tl.constexpr,
    L: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    NORMALISER: tl.constexpr,
    READ_OUT: tl.constexpr,
):
    """grad_q = matrix_weight * grad_h C^T + vector_weight * n + grad_scores k
    grad_k = added * (v dC^T + dn) + grad_scores^T q
    grad_v = added * k dC + scores^T grad_h, the scores divided by the denominator

    C and n (`matrices`, `vectors`) enter a chunk; dC and dn belong to what leaves it. query_products and key_products
    [tiles of DK, BH, NC * L] float32 are the products of q and k with all but the last term of their gradients,
    state_products [L / BM, BH, NC] summands of what the chunk leaves of C and n, times dC and dn. Without READ_OUT
    nothing read the memory: there are no q, grad_h and scores, and no gradient of q.
    """
    tiles_k: tl.constexpr = (DK + BN - 1) // BN
    tiles_v: tl.constexpr = (DV + BN - 1) // BN
    pid = tl.program_id(0)
    # The product of the states comes first: it takes longest, and brings them into the cache.
    jobs: tl.constexpr = 1 + tiles_k + tiles_v + (tiles_k if READ_OUT else 0)
    job, first_row, chunk, chunk_start, batch, head, bh = locate_tile(pid, NH, NC, jobs, L, BM)
    row_stride = row_stride.to(tl.int64)
    state = bh * NC + chunk
    matrices += state * DK * DV
    grad_matrices += state * DK * DV
    vectors += state * DK
    grad_vectors += state * DK
    here = bh * NC * L + first_row
    token = batch * S + first_row
    row = first_row.to(tl.int64)
    row_end = S - first_row
    k += batch * k_stride_b + head * k_stride_h + row * k_stride_s
    v += batch * v_stride_b + head * v_stride_h + row * v_stride_s
    later = tl.minimum(chunk_start + L, S) - first_row
    added = weights + 3 * row_stride + here
    if READ_OUT:
        q += batch * q_stride_b + head * q_stride_h + row * q_stride_s
        grad_h += batch * g_stride_b + head * g_stride_h + row * g_stride_s
        # Of the tile's rows as they read, from the chunk's first column on; of its columns as they are read, by
        # themselves and later rows.
        read_by_rows = grad_scores + here * L
        read_at_columns = here * L + first_row - chunk_start
        scores += read_at_columns
        grad_scores += read_at_columns
    if job == 0:
        part = (first_row - chunk_start) // BM
        product = _state_product(
            matrices, vectors, grad_matrices, grad_vectors, part, L // BM, DK, DV, BS, NORMALISER
        )  # fmt: skip
        place = part.to(tl.int64) * (row_stride // L) + state
        tl.store(state_products + place, tl.load(chunk_decay + state) * product)
    elif job <= tiles_k:
        tile = job - 1
        _token_gradient(
            v, v_stride_s, grad_matrices, 1, DV, added, grad_vectors, added,
            k, k_stride_s, key_products + tile * row_stride + here,
            grad_scores, 1, L, q, q_stride_s, later,
            grad_k + (token * NH + head) * DK, NH * DK, row_end, tile * BN,
            DK, DV, BM, BN, BK, BT, NORMALISER, True, READ_OUT,
        )  # fmt: skip
    elif job <= tiles_k + tiles_v:
        tile = job - 1 - tiles_k
        _token_gradient(
            k, k_stride_s, grad_matrices, DV, 1, added, grad_vectors, added, v, v_stride_s, key_products,
            scores, 1, L, grad_h, g_stride_s, later,
            grad_v + (token * NH + head) * DV, NH * DV, row_end, tile * BN,
            DV, DK, BM, BN, BK, BT, False, False, READ_OUT,
        )  # fmt: skip
    elif READ_OUT:
        tile = job - 1 - tiles_k - tiles_v
        _token_gradient(
            grad_h, g_stride_s, matrices, 1, DV, row_weights + 2 * row_stride + here,
            vectors, row_weights + 3 * row_stride + here,
            q, q_stride_s, query_products + tile * row_stride + here,
            read_by_rows, L, 1, k - (first_row - chunk_start).to(tl.int64) * k_stride_s, k_stride_s,
            tl.minimum(first_row + BM, S) - chunk_start,
            grad_q + (token * NH + head) * DK, NH * DK, row_end, tile * BN,
            DK, DV, BM, BN, BK, BT, NORMALISER, True, True,
        )  # fmt: skip

"""The recurrence between chunks: the memory that enters each chunk, or backwards, its gradient as it leaves each.

Both are one computation: a matrix that is scaled by the chunk's decay and gets a weighted sum of outer products of the
chunk's tokens, k v^T in time's direction and q dh^T against it. The sum is kept in float32; what is written for each
chunk has the inputs' precision, in which the matrix products take it anyway.

Axes: S sequence, DX and DY dimensions of the two factors, L tokens of a chunk, NC chunks, BX x BY the tile of a
program.
"""

import triton
import triton.language as tl

from kernels.triton_support import dot


@triton.jit(do_not_specialize=["S", "NH", "NC"])
def states_kernel(
    x,
    y,
    matrix_weight,
    vector_weight,
    chunk_decay,
    matrix_before,
    vector_before,
    matrices,
    vectors,
    matrix_after,
    vector_after,
    S,
    NH,
    NC,
    x_stride_b,
    x_stride_s,
    x_stride_h,
    y_stride_b,
    y_stride_s,
    y_stride_h,
    DX: tl.constexpr,
    DY: tl.constexpr,
    L: tl.constexpr,
    BX: tl.constexpr,
    BY: tl.constexpr,
    BT: tl.constexpr,
    BACKWARDS: tl.constexpr,
    VECTOR: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    STORE_CHUNKS: tl.constexpr,
    STORE_AFTER: tl.constexpr,
):
    """matrices [BH, NC, DX, DY] and vectors [BH, NC, DX]: what the recurrence holds before each chunk in its direction.

    matrix_weight and vector_weight [BH, NC * L] multiply x for the matrix and for the vector (whose y is 1). BT tokens
    are taken at a time. One program for each sequence, head and tile.
    """
    tiles_x: tl.constexpr = (DX + BX - 1) // BX
    tiles_y: tl.constexpr = (DY + BY - 1) // BY
    pid = tl.program_id(0)
    first_y = (pid % tiles_y) * BY
    first_x = (pid // tiles_y % tiles_x) * BX
    sequence = pid // (tiles_y * tiles_x)
    batch = (sequence // NH).to(tl.int64)
    head = sequence % NH
    x += batch * x_stride_b + head * x_stride_h
    y += batch * y_stride_b + head * y_stride_h
    bh = sequence.to(tl.int64)
    matrix_weight += bh * NC * L
    vector_weight += bh * NC * L
    chunk_decay += bh * NC
    dx = first_x + tl.arange(0, BX)
    dy = first_y + tl.arange(0, BY)
    tokens = tl.arange(0, BT)
    in_matrix = (dx < DX)[:, None] & (dy < DY)[None, :]
    matrix_place = dx[:, None] * DY + dy[None, :]
    matrix = tl.zeros([BX, BY], dtype=tl.float32)
    vector = tl.zeros([BX], dtype=tl.float32)
    if HAS_BEFORE:
        matrix = tl.load(matrix_before + bh * DX * DY + matrix_place, mask=in_matrix, other=0.0)
        if VECTOR:
            vector = tl.load(vector_before + bh * DX + dx, mask=dx < DX, other=0.0)
    writes_vector = VECTOR and first_y == 0
    parts: tl.constexpr = L // BT
    for step in range(NC * parts):
        chunk = step // parts
        if BACKWARDS:
            chunk = NC - 1 - chunk
        is_first = step % parts == 0
        if STORE_CHUNKS:
            place = matrices + (bh * NC + chunk) * DX * DY + matrix_place
            tl.store(place, matrix.to(matrices.dtype.element_ty), mask=in_matrix & is_first)
            if VECTOR:
                tl.store(vectors + (bh * NC + chunk) * DX + dx, vector, mask=(dx < DX) & writes_vector & is_first)
        decay = tl.load(chunk_decay + chunk)
        if parts > 1:
            decay = tl.where(is_first, decay, 1.0)
        token = chunk * L + step % parts * BT + tokens
        weight = tl.load(matrix_weight + token)
        x_place = token.to(tl.int64)[None, :] * x_stride_s + dx[:, None]
        x_here = tl.load(x + x_place, mask=(token < S)[None, :] & (dx < DX)[:, None], other=0.0)
        y_place = token.to(tl.int64)[:, None] * y_stride_s + dy[None, :]
        y_here = tl.load(y + y_place, mask=(token < S)[:, None] & (dy < DY)[None, :], other=0.0)
        wide = x_here.to(tl.float32)
        matrix = dot((wide * weight[None, :]).to(x_here.dtype), y_here, matrix * decay)
        if VECTOR:
            vector = vector * decay + tl.sum(wide * tl.load(vector_weight + token)[None, :], axis=1)
    if STORE_AFTER:
        tl.store(matrix_after + bh * DX * DY + matrix_place, matrix, mask=in_matrix)
        if VECTOR:
            tl.store(vector_after + bh * DX + dx, vector, mask=(dx < DX) & writes_vector)

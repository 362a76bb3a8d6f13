"""The recurrence between chunks: the memory that enters each chunk, or backwards, its gradient as it leaves each.

Both are one computation: a matrix that is scaled by the chunk's decay and gets a weighted sum of outer products of the
chunk's tokens, k v^T in time's direction and q dh^T against it. The first factor is weighted beforehand, by a kernel
that all multiprocessors share, so that the recurrence, which they cannot share, has matrix products alone. The sum is
kept in float32; what is written for each chunk has the inputs' precision, in which the products take it anyway.

Axes: S sequence, DX and DY dimensions of the two factors, L tokens of a chunk, NC chunks, SP = NC * L, BX x BY the tile
of a program, BT tokens that one step takes.
"""

import triton
import triton.language as tl

from kernels.triton_dot import dot


@triton.jit(do_not_specialize=["S", "NH", "NC"])
def weigh_kernel(
    x,
    matrix_weight,
    vector_weight,
    weighed,
    sums,
    S,
    NH,
    NC,
    x_stride_b,
    x_stride_s,
    x_stride_h,
    DX: tl.constexpr,
    L: tl.constexpr,
    BX: tl.constexpr,
    BT: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """weighed [BH, SP, DX] = matrix_weight x, and sums [BH, NC, DX] float32: of vector_weight x over each chunk.

    One program for each chunk of a sequence and head and each BX dimensions.
    """
    tiles_x: tl.constexpr = (DX + BX - 1) // BX
    pid = tl.program_id(0)
    dx = pid % tiles_x * BX + tl.arange(0, BX)
    chunk = pid // tiles_x % NC
    sequence = pid // tiles_x // NC
    batch = (sequence // NH).to(tl.int64)
    bh = sequence.to(tl.int64)
    x += batch * x_stride_b + (sequence % NH).to(tl.int64) * x_stride_h
    total = tl.zeros([BX], dtype=tl.float32)
    for part in tl.static_range(L // BT):
        token = chunk * L + part * BT + tl.arange(0, BT)
        inside = (token < S)[:, None] & (dx < DX)[None, :]
        place = bh * NC * L + token
        wide = tl.load(x + token.to(tl.int64)[:, None] * x_stride_s + dx[None, :], mask=inside, other=0.0)
        wide = wide.to(tl.float32)
        result = wide * tl.load(matrix_weight + place)[:, None]
        tl.store(
            weighed + place[:, None] * DX + dx[None, :],
            result.to(weighed.dtype.element_ty),
            mask=(token >= 0)[:, None] & (dx < DX)[None, :],
        )
        if VECTOR:
            total += tl.sum(wide * tl.load(vector_weight + place)[:, None], axis=0)
    if VECTOR:
        tl.store(sums + (bh * NC + chunk) * DX + dx, total, mask=dx < DX)


@triton.jit(do_not_specialize=["S", "NH", "NC"])
def states_kernel(
    weighed,
    sums,
    y,
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

    `weighed` and `sums` are those of weigh_kernel. One program for each sequence, head and tile.
    """
    tiles_x: tl.constexpr = (DX + BX - 1) // BX
    tiles_y: tl.constexpr = (DY + BY - 1) // BY
    pid = tl.program_id(0)
    first_y = (pid % tiles_y) * BY
    first_x = (pid // tiles_y % tiles_x) * BX
    sequence = pid // (tiles_y * tiles_x)
    bh = sequence.to(tl.int64)
    weighed += bh * NC * L * DX
    sums += bh * NC * DX
    y += (sequence // NH).to(tl.int64) * y_stride_b + (sequence % NH).to(tl.int64) * y_stride_h
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
    in_vector = (dx < DX) & (first_y == 0)
    parts: tl.constexpr = L // BT
    for step in range(NC * parts):
        chunk = step // parts
        if BACKWARDS:
            chunk = NC - 1 - chunk
        is_first = step % parts == 0
        decay = tl.load(chunk_decay + chunk)
        if STORE_CHUNKS:
            place = matrices + (bh * NC + chunk) * DX * DY + matrix_place
            tl.store(place, matrix.to(matrices.dtype.element_ty), mask=in_matrix & is_first)
        if VECTOR:
            if STORE_CHUNKS:
                tl.store(vectors + (bh * NC + chunk) * DX + dx, vector, mask=in_vector & is_first)
            added = tl.load(sums + chunk * DX + dx, mask=in_vector & is_first, other=0.0)
            vector = tl.where(is_first, vector * decay + added, vector)
        if parts > 1:
            decay = tl.where(is_first, decay, 1.0)
        token = chunk * L + step % parts * BT + tokens
        x_place = weighed + token.to(tl.int64)[None, :] * DX + dx[:, None]
        if DX % BX == 0:
            x_here = tl.load(x_place)
        else:
            x_here = tl.load(x_place, mask=(token >= 0)[None, :] & (dx < DX)[:, None], other=0.0)
        y_place = y + token.to(tl.int64)[:, None] * y_stride_s + dy[None, :]
        y_here = tl.load(y_place, mask=(token < S)[:, None] & (dy < DY)[None, :], other=0.0)
        matrix = dot(x_here, y_here, matrix * decay)
    if STORE_AFTER:
        tl.store(matrix_after + bh * DX * DY + matrix_place, matrix, mask=in_matrix)
        if VECTOR:
            tl.store(vector_after + bh * DX + dx, vector, mask=in_vector)

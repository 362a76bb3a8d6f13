"""The two steps that every matrix kernel of the mLSTM is made of: a product summed tile by tile, and decay weights.

Axes: BM rows and BN columns of the tile that a program owns, BK inner positions that one step takes.
"""

import triton
import triton.language as tl

from kernels.triton_dot import dot


@triton.jit
def add_product(
    accumulator,
    a,
    a_row_stride,
    a_inner_stride,
    row_end,
    b,
    b_inner_stride,
    b_column_stride,
    column_end,
    inner_end,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    MASK_INNER: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
):
    """accumulator [BM, BN] += a [BM, inner_end] @ b [inner_end, BN], reading zeros beyond the ends.

    `a` and `b` point at the first element; strides are in elements, one of each pair is 1. Without MASK_INNER,
    inner_end is a multiple of BK; without MASK_COLUMNS, all BN columns exist.
    """
    rows = tl.arange(0, BM)
    columns = tl.arange(0, BN)
    inner = tl.arange(0, BK)
    a_tile = a + rows[:, None] * a_row_stride + inner[None, :] * a_inner_stride
    b_tile = b + inner[:, None] * b_inner_stride + columns[None, :] * b_column_stride
    a_inside = (rows < row_end)[:, None] & (inner >= 0)[None, :]
    for start in range(0, inner_end, BK):
        a_mask = a_inside
        if MASK_INNER:
            a_mask = a_inside & (inner < inner_end - start)[None, :]
        a_here = tl.load(a_tile, mask=a_mask, other=0.0)
        if MASK_INNER and MASK_COLUMNS:
            b_mask = (inner < inner_end - start)[:, None] & (columns < column_end)[None, :]
            b_here = tl.load(b_tile, mask=b_mask, other=0.0)
        elif MASK_INNER:
            b_mask = (inner < inner_end - start)[:, None] & (columns >= 0)[None, :]
            b_here = tl.load(b_tile, mask=b_mask, other=0.0)
        elif MASK_COLUMNS:
            b_mask = (inner >= 0)[:, None] & (columns < column_end)[None, :]
            b_here = tl.load(b_tile, mask=b_mask, other=0.0)
        else:
            b_here = tl.load(b_tile)
        accumulator = dot(a_here, b_here, accumulator)
        a_tile += BK * a_inner_stride
        b_tile += BK * b_inner_stride
    return accumulator


@triton.jit
def decay_weights(weights, row_stride, document, rows, columns, S, HAS_STARTS: tl.constexpr):
    """Weight [BM, BN] of each column's token in the read-out at each row's: 0 for later tokens and other documents.

    `weights` points at the packed weights of a sequence and head (gates.py), `document` at its document numbers.
    """
    high = tl.load(weights + rows)[:, None] + tl.load(weights + row_stride + columns)[None, :]
    rest = tl.load(weights + 5 * row_stride + rows)[:, None] + tl.load(weights + 6 * row_stride + columns)[None, :]
    readable = (rows[:, None] >= columns[None, :]) & (columns < S)[None, :]
    if HAS_STARTS:
        row_document = tl.load(document + rows, mask=rows < S, other=0)
        column_document = tl.load(document + columns, mask=columns < S, other=0)
        readable = readable & (row_document[:, None] == column_document[None, :])
    return tl.exp2(tl.where(readable, high + rest, float("-inf")))


@triton.jit
def locate_tile(pid, NH, NC, COLUMN_TILES: tl.constexpr, L: tl.constexpr, BM: tl.constexpr):
    """What program `pid` owns: (column tile, first row, chunk, first row of the chunk, batch, head, batch x head).

    Column tiles come first, so that neighbouring programs read the same rows. Batch and head numbers are 64 bits wide,
    so that offsets made of them are: in a layout with heads before tokens those of heads are the large ones.
    """
    row_tiles = NC * (L // BM)
    first_row = (pid // COLUMN_TILES % row_tiles) * BM
    sequence = pid // (COLUMN_TILES * row_tiles)
    chunk = first_row // L
    batch = (sequence // NH).to(tl.int64)
    return pid % COLUMN_TILES, first_row, chunk, chunk * L, batch, (sequence % NH).to(tl.int64), sequence.to(tl.int64)

"""The Triton kernels of products of one row: a program multiplies it by a few rows of a weight, and sums.

The first piece of the weight is loaded before anything is computed, so that memory is at work while the norm is.

Axes: K inputs, N outputs, NH heads, DV value dimension of a head.
"""

import triton
import triton.language as tl

from kernels.decoding.places import feature_place, weight_tile
from kernels.triton_soft_cap import soft_capped


@triton.jit
def _rms_scale(x, eps, K: tl.constexpr, WIDTH: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps)."""
    column = tl.arange(0, WIDTH)
    values = tl.load(x + column, column < K, 0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(values * values, 0) / K + eps)


@triton.jit
def _piece(x, norm_weight, scale, column, K: tl.constexpr):
    """Columns of what enters the product, in float32: rounded to x's dtype behind the norm, if there is one."""
    inside = column < K
    values = tl.load(x + column, inside, 0.0)
    if norm_weight is not None:
        normed = values.to(tl.float32) * scale * tl.load(norm_weight + column, inside, 0.0).to(tl.float32)
        values = normed.to(x.dtype.element_ty)
    return values.to(tl.float32)


@triton.jit
def projections_kernel(
    x,
    norm_weight,
    q,
    k,
    v,
    output_gate,
    igate,
    igate_bias,
    fgate,
    fgate_bias,
    features,
    gates,
    eps,
    cap,
    QK: tl.constexpr,
    V: tl.constexpr,
    NH: tl.constexpr,
    K: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    weight, bias, outputs, tile, place, is_gate = feature_place(
        q, k, v, output_gate, igate, igate_bias, fgate, fgate_bias, QK, V, NH, BLOCK_N
    )
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    first = weight_tile(weight, row, column, outputs, K)
    scale = _rms_scale(x, eps, K, WIDTH)
    sums = first.to(tl.float32) * _piece(x, norm_weight, scale, column, K)[None, :]
    for begin in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        column = begin + tl.arange(0, BLOCK_K)
        piece = weight_tile(weight, row, column, outputs, K).to(tl.float32)
        sums += piece * _piece(x, norm_weight, scale, column, K)[None, :]
    y = tl.sum(sums, 1)
    inside = row < outputs
    if is_gate:
        y, _ = soft_capped(y + tl.load(bias + row, inside, 0.0).to(tl.float32), cap, HAS_CAP)
        tl.store(gates + place + row, y, inside)
    else:
        tl.store(features + place + row, y, inside)


@triton.jit
def swiglu_kernel(
    x,
    norm_weight,
    gate_weight,
    up_weight,
    y,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    first_gate = weight_tile(gate_weight, row, column, N, K)
    first_up = weight_tile(up_weight, row, column, N, K)
    scale = _rms_scale(x, eps, K, WIDTH)
    values = _piece(x, norm_weight, scale, column, K)[None, :]
    gate_sums, up_sums = first_gate.to(tl.float32) * values, first_up.to(tl.float32) * values
    for begin in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        column = begin + tl.arange(0, BLOCK_K)
        gate_piece = weight_tile(gate_weight, row, column, N, K)
        up_piece = weight_tile(up_weight, row, column, N, K)
        values = _piece(x, norm_weight, scale, column, K)[None, :]
        gate_sums += gate_piece.to(tl.float32) * values
        up_sums += up_piece.to(tl.float32) * values
    gate = tl.sum(gate_sums, 1)
    tl.store(y + row, gate * tl.sigmoid(gate) * tl.sum(up_sums, 1), row < N)


@triton.jit
def product_kernel(
    x,
    norm_weight,
    weight,
    residual,
    y,
    eps,
    cap,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One weight; without norm where norm_weight is None, without residual where that is."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    first = weight_tile(weight, row, column, N, K)
    scale = 1.0
    if norm_weight is not None:
        scale = _rms_scale(x, eps, K, WIDTH)
    sums = first.to(tl.float32) * _piece(x, norm_weight, scale, column, K)[None, :]
    for begin in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        column = begin + tl.arange(0, BLOCK_K)
        piece = weight_tile(weight, row, column, N, K).to(tl.float32)
        sums += piece * _piece(x, norm_weight, scale, column, K)[None, :]
    total = tl.sum(sums, 1)
    if residual is not None:
        total += tl.load(residual + row, row < N, 0.0).to(tl.float32)
    capped, _ = soft_capped(total, cap, HAS_CAP)
    tl.store(y + row, capped, row < N)


@triton.jit
def gated_product_kernel(
    h,
    gate_preact,
    norm_weight,
    weight,
    residual,
    y,
    eps,
    N: tl.constexpr,
    NH: tl.constexpr,
    DV: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The product with the gated head norm of h, which a program holds whole: HEADS heads of WIDTH elements."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    position = tl.arange(0, HEADS * WIDTH)
    head, place = position // WIDTH, position % WIDTH
    inside = (head < NH) & (place < DV)
    column = head * DV + place
    at = weight + row[:, None].to(tl.int64) * (NH * DV) + column[None, :]
    matrix = tl.load(at, (row < N)[:, None] & inside[None, :], 0.0, eviction_policy="evict_first")
    values = tl.load(h + column, inside, 0.0).to(tl.float32)
    gate = tl.load(gate_preact + column, inside, 0.0).to(tl.float32)
    scaling = tl.load(norm_weight + column, inside, 0.0).to(tl.float32)
    by_head = tl.reshape(values, [HEADS, WIDTH])
    centred = by_head - tl.sum(by_head, 1)[:, None] / DV
    if WIDTH > DV:
        centred = tl.where((tl.arange(0, WIDTH) < DV)[None, :], centred, 0.0)
    variance = tl.sum(centred * centred, 1)[:, None] / DV
    normalised = tl.reshape(centred * tl.rsqrt(variance + eps), [HEADS * WIDTH])
    gated = (tl.sigmoid(gate) * (normalised * scaling)).to(h.dtype.element_ty).to(tl.float32)
    total = tl.sum(matrix.to(tl.float32) * gated[None, :], 1)
    total += tl.load(residual + row, row < N, 0.0).to(tl.float32)
    tl.store(y + row, total, row < N)

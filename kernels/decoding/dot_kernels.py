"""The Triton kernels of products of several rows: weights stream by tensor cores that hold all rows at once.

Results are computed transposed, [N, M]: the weight is the operand with many rows, as tensor cores want it.

Axes: M rows, K inputs, N outputs.
"""

import triton
import triton.language as tl

from kernels.decoding.places import feature_place, weight_tile
from kernels.triton_dot import dot
from kernels.triton_soft_cap import soft_capped


@triton.jit
def _inputs(x, member, rows, column, K: tl.constexpr):
    """Columns of x [M, K], transposed: [columns, M]; 0 outside."""
    inside = (member < rows)[None, :] & (column < K)[:, None]
    return tl.load(x + member[None, :] * K + column[:, None], inside, 0.0)


@triton.jit
def _product(
    x,
    member,
    rows,
    weight,
    row,
    outputs,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """weight x^T [N, M] in float32."""
    sums = tl.zeros([row.shape[0], member.shape[0]], tl.float32)
    for begin in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        column = begin + tl.arange(0, BLOCK_K)
        sums = dot(weight_tile(weight, row, column, outputs, K), _inputs(x, member, rows, column, K), sums)
    return sums


@triton.jit(do_not_specialize=["rows"])
def projections_kernel(
    x,
    rows,
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
    cap,
    QK: tl.constexpr,
    V: tl.constexpr,
    NH: tl.constexpr,
    K: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    weight, bias, outputs, tile, place, is_gate = feature_place(
        q, k, v, output_gate, igate, igate_bias, fgate, fgate_bias, QK, V, NH, BLOCK_N
    )
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    member = tl.arange(0, BLOCK_M)
    y = _product(x, member, rows, weight, row, outputs, K, BLOCK_K, STAGES)
    inside = (row < outputs)[:, None] & (member < rows)[None, :]
    if is_gate:
        y += tl.load(bias + row, row < outputs, 0.0).to(tl.float32)[:, None]
        at = gates + member[None, :] * (2 * NH) + place + row[:, None]
        y, _ = soft_capped(y, cap, HAS_CAP)
        tl.store(at, y, inside)
    else:
        tl.store(features + member[None, :] * (2 * QK + 2 * V) + place + row[:, None], y, inside)


@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(
    x,
    rows,
    gate_weight,
    up_weight,
    y,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    member = tl.arange(0, BLOCK_M)
    gate, up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32), tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for begin in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        column = begin + tl.arange(0, BLOCK_K)
        gate_tile, up_tile = weight_tile(gate_weight, row, column, N, K), weight_tile(up_weight, row, column, N, K)
        values = _inputs(x, member, rows, column, K)
        gate, up = dot(gate_tile, values, gate), dot(up_tile, values, up)
    inside = (row < N)[:, None] & (member < rows)[None, :]
    tl.store(y + member[None, :] * N + row[:, None], gate * tl.sigmoid(gate) * up, inside)


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x,
    rows,
    weight,
    residual,
    y,
    cap,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One weight; without residual where that is None."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    member = tl.arange(0, BLOCK_M)
    total = _product(x, member, rows, weight, row, N, K, BLOCK_K, STAGES)
    inside = (row < N)[:, None] & (member < rows)[None, :]
    at = member[None, :] * N + row[:, None]
    if residual is not None:
        total += tl.load(residual + at, inside, 0.0).to(tl.float32)
    capped, _ = soft_capped(total, cap, HAS_CAP)
    tl.store(y + at, capped, inside)


@triton.jit
def rms_norm_kernel(x, norm_weight, y, eps, K: tl.constexpr, WIDTH: tl.constexpr):
    """A program normalises one row."""
    column = tl.arange(0, WIDTH)
    inside = column < K
    at = tl.program_id(0) * K + column
    values = tl.load(x + at, inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / K + eps)
    tl.store(y + at, values * scale * tl.load(norm_weight + column, inside, 0.0).to(tl.float32), inside)

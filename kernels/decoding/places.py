"""What the Triton kernels of one row and of several share: which weight a program reads, and where.

Axes: K inputs, N outputs.
"""

import triton
import triton.language as tl


@triton.jit
def weight_tile(weight, row, column, outputs, K: tl.constexpr):
    """Rows and columns of a weight [outputs, K], 0 outside. Nothing reads them again: they need not stay in a cache."""
    at = weight + row[:, None].to(tl.int64) * K + column[None, :]
    return tl.load(at, (row < outputs)[:, None] & (column < K)[None, :], 0.0, eviction_policy="evict_first")


@triton.jit
def feature_place(
    q,
    k,
    v,
    output_gate,
    igate,
    igate_bias,
    fgate,
    fgate_bias,
    QK: tl.constexpr,
    V: tl.constexpr,
    NH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Which of the weights of an mLSTM layer this program reads.

    Returns: the weight, the bias (a gate's), the weight's outputs, the program's number among its, where its outputs
    begin among all of their kind (features or gates), and whether it is a gate's.
    """
    qk_programs: tl.constexpr = (QK + BLOCK_N - 1) // BLOCK_N
    v_programs: tl.constexpr = (V + BLOCK_N - 1) // BLOCK_N
    gate_programs: tl.constexpr = (NH + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    weight, bias, outputs, place = q, igate_bias, QK, 0
    is_gate = tile >= 2 * (qk_programs + v_programs)
    if is_gate:
        tile -= 2 * (qk_programs + v_programs)
        weight, outputs = igate, NH
        if tile >= gate_programs:
            tile -= gate_programs
            weight, bias, place = fgate, fgate_bias, NH
    elif tile >= 2 * qk_programs + v_programs:
        tile -= 2 * qk_programs + v_programs
        weight, outputs, place = output_gate, V, 2 * QK + V
    elif tile >= 2 * qk_programs:
        tile -= 2 * qk_programs
        weight, outputs, place = v, V, 2 * QK
    elif tile >= qk_programs:
        tile -= qk_programs
        weight, place = k, QK
    return weight, bias, outputs, tile, place, is_gate

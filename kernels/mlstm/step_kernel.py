"""The Triton kernel of the mLSTM step: a program updates and reads one group of columns of the memory of one head.

Every program keeps the normaliser n and the stabiliser m of its group for itself, so that none reads what another
writes (kernels.mlstm.step.DecodingState).

Axes: B batch, NH heads, DK query/key and DV value dimension of a head.
"""

import triton
import triton.language as tl


@triton.jit
def _log_sigmoid(x):
    # log(1 + e) loses a small e to rounding; the factor e / ((1 + e) - 1) puts it back.
    e = tl.exp(-tl.abs(x))
    rounded = 1.0 + e
    correction = tl.where(rounded == 1.0, e, tl.log(rounded) * (e / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
    return tl.minimum(x, 0.0) - correction


@triton.jit(do_not_specialize=["q_batch", "k_batch", "v_batch", "igate_batch", "fgate_batch"])
def step_kernel(
    q,
    k,
    v,
    igate_preact,
    fgate_preact,
    C,
    n,
    m,
    h,
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    igate_batch,
    igate_head,
    fgate_batch,
    fgate_head,
    q_scale,
    eps,
    NH: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXP_GATE: tl.constexpr,
    NORMALISER: tl.constexpr,
):
    cell = tl.program_id(1).to(tl.int64)
    batch, head = cell // NH, cell % NH
    group = cell * tl.num_programs(0) + tl.program_id(0)
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < DK, column < DV

    # All loads before any use, the memory first: without barriers the compiler puts waits for some before others. Nor
    # may a thread overwrite what another, that holds the same element, has yet to read.
    at = C + cell * (DK * DV) + row[:, None] * DV + column[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    memory = tl.load(at, inside, 0.0)
    tl.debug_barrier()
    key = tl.load(k + batch * k_batch + head * k_head + row, row_inside, 0.0)
    query = tl.load(q + batch * q_batch + head * q_head + row, row_inside, 0.0)
    value = tl.load(v + batch * v_batch + head * v_head + column, column_inside, 0.0)
    normaliser = tl.load(n + group * DK + row, row_inside, 0.0)
    igate = tl.load(igate_preact + batch * igate_batch + head * igate_head)
    fgate = tl.load(fgate_preact + batch * fgate_batch + head * fgate_head)
    m_before = tl.load(m + group)
    tl.debug_barrier()

    key, query, value = key.to(tl.float32), query.to(tl.float32) * q_scale, value.to(tl.float32)
    igate = igate.to(tl.float32)
    log_forget = _log_sigmoid(fgate.to(tl.float32))
    if EXP_GATE:
        log_input = igate
        # Gates that are all shut must not make -inf - -inf.
        m_after = tl.maximum(tl.maximum(log_forget + m_before, log_input), -3.4028234663852886e38)
    else:
        log_input = _log_sigmoid(igate)
        m_after = m_before
    forget = tl.exp(log_forget + m_before - m_after)
    key = key * tl.exp(log_input - m_after)
    normaliser = forget * normaliser + key
    tl.store(n + group * DK + row, normaliser, row_inside)
    tl.store(m + group, m_after)

    memory = forget * memory + key[:, None] * value[None, :]
    tl.store(at, memory, inside)
    read = tl.sum(query[:, None] * memory, 0)
    if NORMALISER:
        read = read / (tl.maximum(tl.abs(tl.sum(query * normaliser, 0)), tl.exp(-m_after)) + eps)
    tl.store(h + cell * DV + column, read, column_inside)

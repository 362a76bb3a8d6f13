"""The mLSTM step as one Triton kernel: a program updates and reads a few columns of the memory of one head.

Every program of a head computes the new normaliser n and stabiliser m for itself. The old ones may be overwritten only
when all have read them, so the programs count themselves, and the last one writes: no second launch, no second buffer,
and nothing depends on their order, because all of them would write the same numbers.

Axes: B batch, NH heads, DK query/key and DV value dimension of a head.
"""

import weakref

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_support import next_power_of_two

# Elements of the memory that a program holds, and its columns: enough programs for a whole GPU at B = 1, and whole
# cache lines of 128 bytes where DK allows it.
TILE = {"elements": 8192, "most_columns": 32, "num_warps": 8}
_LEAST_COLUMNS = 16


@triton.jit
def _log_sigmoid(x):
    # log(1 + e) loses a small e to rounding; the factor e / ((1 + e) - 1) puts it back.
    e = tl.exp(-tl.abs(x))
    rounded = 1.0 + e
    correction = tl.where(rounded == 1.0, e, tl.log(rounded) * (e / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
    return tl.minimum(x, 0.0) - correction


@triton.jit(do_not_specialize=["q_batch", "k_batch", "v_batch", "igate_batch", "fgate_batch"])
def _step(
    q,
    k,
    v,
    igate_preact,
    fgate_preact,
    C,
    n,
    m,
    arrivals,
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
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < DK, column < DV

    # All loads before any use, the memory first: without barriers the compiler puts waits for some before others.
    at = C + cell * (DK * DV) + row[:, None] * DV + column[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    memory = tl.load(at, inside, 0.0)
    tl.debug_barrier()
    key = tl.load(k + batch * k_batch + head * k_head + row, row_inside, 0.0)
    query = tl.load(q + batch * q_batch + head * q_head + row, row_inside, 0.0)
    value = tl.load(v + batch * v_batch + head * v_head + column, column_inside, 0.0)
    normaliser = tl.load(n + cell * DK + row, row_inside, 0.0)
    igate = tl.load(igate_preact + batch * igate_batch + head * igate_head)
    fgate = tl.load(fgate_preact + batch * fgate_batch + head * fgate_head)
    m_before = tl.load(m + cell)
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
    denominator = tl.maximum(tl.abs(tl.sum(query * normaliser, 0)), tl.exp(-m_after)) + eps

    # Behind the barrier every thread has used what it read of n and m, so the last program may overwrite them. Its
    # numbers come from its own registers: the count has nothing to publish, and needs no fence.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals + cell, 1, sem="relaxed")

    memory = forget * memory + key[:, None] * value[None, :]
    tl.store(at, memory, inside)
    read = tl.sum(query[:, None] * memory, 0)
    if NORMALISER:
        read = read / denominator
    tl.store(h + cell * DV + column, read, column_inside)

    if arrived == tl.num_programs(0) - 1:
        tl.store(n + cell * DK + row, normaliser, row_inside)
        tl.store(m + cell, m_after)
        # For the next step.
        tl.store(arrivals + cell, 0)


# Zeros between the launches. Each state has its own, so that steps on two states may run at the same time.
_arrivals: dict[int, tuple[weakref.ref, Tensor]] = {}


def _arrivals_of(m: Tensor) -> Tensor:
    """[B * NH] int32, the counters of the state that `m` belongs to, for as long as that tensor lives."""
    known = _arrivals.get(id(m))
    if known is not None and known[0]() is m:
        return known[1]
    counters = torch.zeros(m.numel(), dtype=torch.int32, device=m.device)
    key = id(m)
    _arrivals[key] = (weakref.ref(m, lambda _: _arrivals.pop(key, None)), counters)
    return counters


def launch_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    C: Tensor,
    n: Tensor,
    m: Tensor,
    arrivals: Tensor,
    gate: str,
    normaliser: bool,
    eps: float,
) -> Tensor:
    """As kernels.mlstm.step.mlstm_step; arrivals [B * NH] int32 is zero before and after."""
    batch, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    h = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    rows = max(16, next_power_of_two(key_dim))
    columns = min(max(TILE["elements"] // rows, _LEAST_COLUMNS), TILE["most_columns"])
    with torch.cuda.device_of(q):
        _step[(triton.cdiv(value_dim, columns), batch * heads)](
            q,
            k,
            v,
            igate_preact,
            fgate_preact,
            C,
            n,
            m,
            arrivals,
            h,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *igate_preact.stride(),
            *fgate_preact.stride(),
            key_dim**-0.5,
            eps,
            NH=heads,
            DK=key_dim,
            DV=value_dim,
            ROWS=rows,
            COLUMNS=columns,
            EXP_GATE=gate == "exp",
            NORMALISER=normaliser,
            num_warps=TILE["num_warps"],
        )
    return h


@torch.library.custom_op("xlstm_pretrain::mlstm_step", mutates_args=("C", "n", "m"))
def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    C: Tensor,
    n: Tensor,
    m: Tensor,
    gate: str,
    normaliser: bool,
    eps: float,
) -> Tensor:
    """As kernels.mlstm.step.mlstm_step."""
    return launch_step(q, k, v, igate_preact, fgate_preact, C, n, m, _arrivals_of(m), gate, normaliser, eps)


@mlstm_step.register_fake
def _(q, k, v, igate_preact, fgate_preact, C, n, m, gate, normaliser, eps):
    return v.new_empty(v.shape)

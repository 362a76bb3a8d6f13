"""What depends on the gates alone, for a whole sequence at once: every weight that the big kernels need.

The stabiliser m is a running maximum of sums of gates, so it never depends on a query or key, and the kernels that
multiply matrices need no running maximum of their own. All logarithms are to base 2.

Every kernel has one program for each chunk of each sequence and head, which goes through the totals of the other chunks
by itself: a pass over the gates that waits for nothing.

Axes: BH batch times heads, NC chunks, L tokens of a chunk.
Weights [BH, NC * L] of a token t in the chunk that begins at c, with F the sum of log forget gates from c (or from
the start of t's document, if that is later) to t:

    row_log    F - m_t            exp2(row_log[t] + col_log[s]) is the weight of token s in the read-out at t
    col_log    i_t - F            F may be thousands, and what float32 drops of both is kept in row_rest and col_rest
    carry      weight of the memory that enters the chunk in the read-out at t; 0 if it belongs to another document
    added      weight of token t in the memory that leaves the chunk; 0 if that belongs to another document
    floor      exp(-m_t)
"""

import triton
import triton.language as tl

# Rows of the packed weights.
ROW_LOG, COL_LOG, CARRY, ADDED, FLOOR, ROW_REST, COL_REST = range(7)

LOG2_E = tl.constexpr(1.4426950408889634)
# Least log forget gate: its weight is 0, and sums with it are finite and keep their precision.
SHUT = tl.constexpr(-(2.0**20))
# Totals of other chunks that a program takes at a time.
TOTALS = tl.constexpr(64)


@triton.jit
def _log_sigmoid(x):
    """log2(sigmoid(x)), accurate for any x: log1p by the series of 2 artanh(e / (2 + e)), which needs no library."""
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    z = e / (2 + e)
    square = z * z
    series = 1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square * (1 / 11 + square * (1 / 13)))))
    return (tl.minimum(x, 0.0) - 2 * (z + z * square * series)) * LOG2_E


@triton.jit
def _sigmoid(x):
    """sigmoid(x) without overflow."""
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    return tl.where(x >= 0, 1.0, e) / (1 + e)


@triton.jit
def _then(left_starts, left_decay, left_max, right_starts, right_decay, right_max):
    """Two neighbouring stretches of tokens as one: (document starts, log decay, largest weighted input gate)."""
    crosses = right_starts == 0
    decay = tl.where(crosses, left_decay + right_decay, right_decay)
    largest = tl.where(crosses, tl.maximum(left_max + right_decay, right_max), right_max)
    return left_starts + right_starts, decay, largest


@triton.jit
def _scan_chunk(
    igate,
    fgate,
    document_start,
    first,
    S,
    NH,
    HAS_STARTS: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    L: tl.constexpr,
):
    """For each token of a chunk: log input gate, and the stretch up to it as in _then, in float64 logarithms."""
    token = first + tl.arange(0, L)
    valid = token < S
    offset = token.to(tl.int64) * NH
    log_input = tl.load(igate + offset, mask=valid, other=0.0).to(tl.float32)
    log_input = log_input * LOG2_E if EXPONENTIAL else _log_sigmoid(log_input)
    # Tokens behind the last one change nothing: their input gates are shut and their forget gates open.
    log_input = tl.where(valid, log_input, float("-inf")).to(tl.float64)
    log_forget = _log_sigmoid(tl.load(fgate + offset, mask=valid, other=0.0).to(tl.float32))
    log_forget = tl.where(log_forget < SHUT, SHUT, log_forget)
    log_forget = tl.where(valid, log_forget, 0.0).to(tl.float64)
    starts = tl.zeros([L], dtype=tl.float32)
    if HAS_STARTS:
        starts = tl.load(document_start + token, mask=valid, other=0).to(tl.float32)
    # A document starts with m = 0 and nothing in the memory.
    first_max = tl.where(starts > 0, tl.maximum(log_forget, log_input), log_input)
    starts, decay, largest = tl.associative_scan((starts, log_forget, first_max), 0, _then)
    return log_input, starts, decay, largest


@triton.jit
def _at(values, index, SIZE: tl.constexpr):
    """One element of a block [SIZE]."""
    return tl.max(tl.where(tl.arange(0, SIZE) == index, values, float("-inf")), axis=0)


@triton.jit(do_not_specialize=["S", "NH", "NC", "total_stride"])
def chunk_totals_kernel(
    igate,
    fgate,
    document_start,
    totals,
    S,
    NH,
    NC,
    total_stride,
    HAS_STARTS: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    L: tl.constexpr,
):
    """totals [3, BH, NC] float64: document starts, log decay and largest weighted input gate of each chunk."""
    pid = tl.program_id(0)
    sequence = pid // NC
    chunk = pid % NC
    batch = (sequence // NH).to(tl.int64)
    gate_offset = batch * S * NH + sequence % NH
    if HAS_STARTS:
        document_start += batch * S
    _, starts, decay, largest = _scan_chunk(
        igate + gate_offset, fgate + gate_offset, document_start, chunk * L, S, NH, HAS_STARTS, EXPONENTIAL, L
    )
    tl.store(totals + pid, _at(starts, L - 1, L).to(tl.float64))
    tl.store(totals + total_stride + pid, _at(decay, L - 1, L))
    tl.store(totals + 2 * total_stride + pid, _at(largest, L - 1, L))


@triton.jit(do_not_specialize=["S", "NH", "NC", "total_stride", "row_stride"])
def weights_kernel(
    igate,
    fgate,
    document_start,
    m_initial,
    totals,
    weights,
    chunk_decay,
    m_final,
    S,
    NH,
    NC,
    total_stride,
    row_stride,
    HAS_STARTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    M_BEFORE: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    L: tl.constexpr,
):
    """The weights of every token, the decay of every chunk [BH, NC], and the last stabiliser [BH].

    M_BEFORE is the stabiliser before the first token where no initial one is given.
    """
    pid = tl.program_id(0)
    sequence = pid // NC
    chunk = pid % NC
    batch = (sequence // NH).to(tl.int64)
    gate_offset = batch * S * NH + sequence % NH
    row_stride = row_stride.to(tl.int64)
    if HAS_STARTS:
        document_start += batch * S
    log_input, starts, decay, largest = _scan_chunk(
        igate + gate_offset, fgate + gate_offset, document_start, chunk * L, S, NH, HAS_STARTS, EXPONENTIAL, L
    )
    m_before = tl.full([], M_BEFORE, dtype=tl.float64)
    if HAS_INITIAL:
        m_before = tl.load(m_initial + sequence).to(tl.float64) * LOG2_E
    totals += sequence.to(tl.int64) * NC
    places = tl.arange(0, TOTALS)
    for first in range(0, chunk, TOTALS):
        earlier = first + places < chunk
        chunk_starts = tl.load(totals + first + places, mask=earlier, other=0.0).to(tl.float32)
        chunk_sums = tl.load(totals + total_stride + first + places, mask=earlier, other=0.0)
        chunk_largest = tl.load(totals + 2 * total_stride + first + places, mask=earlier, other=float("-inf"))
        chunk_starts, chunk_sums, chunk_largest = tl.associative_scan(
            (chunk_starts, chunk_sums, chunk_largest), 0, _then
        )
        last_largest = _at(chunk_largest, TOTALS - 1, TOTALS)
        carried = tl.maximum(m_before + _at(chunk_sums, TOTALS - 1, TOTALS), last_largest)
        m_before = tl.where(_at(chunk_starts, TOTALS - 1, TOTALS) == 0, carried, last_largest)

    m = tl.where(starts == 0, tl.maximum(m_before + decay, largest), largest)
    if not EXPONENTIAL:
        m_before = tl.zeros([], dtype=tl.float64)
        m = tl.zeros([L], dtype=tl.float64)
    starts_end = _at(starts, L - 1, L)
    decay_end = _at(decay, L - 1, L)
    m_after = _at(m, L - 1, L)
    carry = tl.where(starts == 0, tl.exp2((decay + m_before - m).to(tl.float32)), 0.0)
    added = tl.exp2((decay_end - decay + log_input - m_after).to(tl.float32))
    added = tl.where(starts == starts_end, added, 0.0)
    row_log = decay - m
    col_log = log_input - decay
    row_high = row_log.to(tl.float32)
    col_high = col_log.to(tl.float32)
    # The rest of a shut gate, infinity less infinity, is nothing.
    col_rest = tl.where(col_log > float("-inf"), (col_log - col_high).to(tl.float32), 0.0)
    here = weights + pid.to(tl.int64) * L + tl.arange(0, L)
    tl.store(here, row_high)
    tl.store(here + row_stride, col_high)
    tl.store(here + 2 * row_stride, carry)
    tl.store(here + 3 * row_stride, added)
    tl.store(here + 4 * row_stride, tl.exp2((-m).to(tl.float32)))
    tl.store(here + 5 * row_stride, (row_log - row_high).to(tl.float32))
    tl.store(here + 6 * row_stride, col_rest)
    kept = tl.exp2((decay_end + m_before - m_after).to(tl.float32))
    tl.store(chunk_decay + pid, tl.where(starts_end == 0, kept, 0.0))
    tl.store(m_final + sequence, (m_after / LOG2_E).to(tl.float32), mask=chunk == NC - 1)


@triton.jit
def _sum_until_start(left_ends, left_sum, right_ends, right_sum):
    """As _then, for plain sums."""
    return left_ends + right_ends, tl.where(right_ends == 0, left_sum + right_sum, right_sum)


@triton.jit
def _sum_parts(parts, part_stride, places, valid, PARTS: tl.constexpr, L: tl.constexpr):
    """The sum of PARTS rows at `places`, [L]."""
    total = tl.zeros([L], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * part_stride + places, mask=valid, other=0.0)
    return total


@triton.jit(do_not_specialize=["S", "NH", "NC", "part_stride"])
def gate_gradients_kernel(
    weight_sums,
    query_products,
    key_products,
    state_products,
    igate,
    fgate,
    document_start,
    grad_igate,
    grad_fgate,
    S,
    NH,
    NC,
    part_stride,
    SUM_PARTS: tl.constexpr,
    QUERY_PARTS: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    STATE_PARTS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    L: tl.constexpr,
):
    """Gradients of the gates.

    The log weight of token s at token t gets the gradient G[t, s]. The log input gate of token s gets the sum of G
    over t, and the log forget gate of token j the sum of G over t >= j > s: that is the sum over the tokens t >= j of
    the document of (the sum of G[t, s] over s < t) - (the sum of G[u, t] over u > t). Inside a chunk the sums come
    from weight_sums (scores.py), between a chunk's tokens and its edges from query_products and key_products
    and, across the whole chunk, from state_products (backward.py): as a difference of the others, carried from chunk
    to chunk, it would be known to the sum of their roundings only.
    """
    pid = tl.program_id(0)
    sequence = pid // NC
    chunk = pid % NC
    batch = (sequence // NH).to(tl.int64)
    gate_offset = batch * S * NH + sequence % NH
    part_stride = part_stride.to(tl.int64)
    places = tl.arange(0, L)
    token = chunk * L + places
    valid = token < S
    row = pid.to(tl.int64) * L + places
    by_memory = _sum_parts(query_products, part_stride, row, valid, QUERY_PARTS, L)
    to_memory = _sum_parts(key_products, part_stride, row, valid, KEY_PARTS, L)
    # The sum of G over all readers behind this chunk and all sources up to its end.
    behind = tl.sum(to_memory, axis=0)
    for part in tl.static_range(STATE_PARTS):
        behind += tl.load(state_products + part * (part_stride // L) + pid)
    as_source = to_memory + _sum_parts(weight_sums + 2 * part_stride, part_stride, row, valid, SUM_PARTS, L)
    as_reader = by_memory + tl.load(weight_sums + part_stride + row, mask=valid, other=0.0)
    grad_log_input = as_source + tl.load(weight_sums + row, mask=valid, other=0.0)
    # The forget gate of a document's first token multiplies an empty memory.
    idle = valid & (token == 0) if not HAS_INITIAL else valid & (token < 0)
    ends = tl.zeros([L], dtype=tl.float32)
    if HAS_STARTS:
        document_start += batch * S
        idle = idle | (tl.load(document_start + token, mask=valid, other=0) != 0)
        starts_next = tl.load(document_start + token + 1, mask=token + 1 < S, other=0)
        # A chunk ends no document: what its memory gives to the next one is part of to_memory.
        ends = tl.where(places < L - 1, starts_next.to(tl.float32), 0.0)
    ends, inside = tl.associative_scan((ends, as_reader - as_source), 0, _sum_until_start, reverse=True)
    grad_log_forget = tl.where(ends == 0, inside + behind, inside)
    offset = gate_offset + token.to(tl.int64) * NH
    f = tl.load(fgate + offset, mask=valid, other=0.0).to(tl.float32)
    grad_f = tl.where(idle, 0.0, grad_log_forget * _sigmoid(-f))
    grad_i = grad_log_input
    if not EXPONENTIAL:
        grad_i *= _sigmoid(-tl.load(igate + offset, mask=valid, other=0.0).to(tl.float32))
    tl.store(grad_igate + offset, grad_i, mask=valid)
    tl.store(grad_fgate + offset, grad_f, mask=valid)

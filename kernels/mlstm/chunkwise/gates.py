"""What depends on the gates alone, for a whole sequence at once: every weight that the big kernels need.

The stabiliser m is a running maximum of sums of gates, so it never depends on a query or key, and the kernels that
multiply matrices need no running maximum of their own. All logarithms are to base 2.

Axes: BH batch times heads, NC chunks, L tokens of a chunk, CB chunks that one step of the loop takes.
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
WEIGHT_ROWS = 7

LOG2_E = tl.constexpr(1.4426950408889634)


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


@triton.jit(do_not_specialize=["S", "NH", "NC", "row_stride"])
def weights_kernel(
    igate,
    fgate,
    document_start,
    m_initial,
    weights,
    chunk_decay,
    m_final,
    S,
    NH,
    NC,
    row_stride,
    HAS_STARTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    L: tl.constexpr,
    CB: tl.constexpr,
):
    """One program for each sequence and head."""
    pid = tl.program_id(0)
    batch = (pid // NH).to(tl.int64)
    head = pid % NH
    igate += batch * S * NH + head
    fgate += batch * S * NH + head
    row_stride = row_stride.to(tl.int64)
    weights += pid.to(tl.int64) * NC * L
    chunk_decay += pid.to(tl.int64) * NC
    chunks = tl.arange(0, CB)
    places = tl.arange(0, L)
    m_before_block = tl.zeros([], dtype=tl.float64)
    if HAS_INITIAL:
        m_before_block = tl.load(m_initial + pid).to(tl.float64) * LOG2_E
    for first_chunk in range(0, NC, CB):
        token = ((first_chunk + chunks) * L)[:, None] + places[None, :]
        valid = token < S
        offset = token.to(tl.int64) * NH
        log_input = tl.load(igate + offset, mask=valid, other=0.0).to(tl.float32)
        log_input = log_input * LOG2_E if EXPONENTIAL else _log_sigmoid(log_input)
        log_input = tl.where(valid, log_input, float("-inf")).to(tl.float64)
        log_forget = _log_sigmoid(tl.load(fgate + offset, mask=valid, other=0.0).to(tl.float32))
        log_forget = tl.where(valid, log_forget, 0.0).to(tl.float64)
        starts = tl.zeros([CB, L], dtype=tl.float32)
        if HAS_STARTS:
            starts = tl.load(document_start + batch * S + token, mask=valid, other=0).to(tl.float32)
        # A document starts with m = 0 and nothing in the memory.
        first_max = tl.where(starts > 0, tl.maximum(log_forget, log_input), log_input)
        starts, decay, largest = tl.associative_scan((starts, log_forget, first_max), 1, _then)

        at_end = (places == L - 1)[None, :]
        starts_end = tl.sum(tl.where(at_end, starts, 0.0), axis=1)
        decay_end = tl.sum(tl.where(at_end, decay, 0.0), axis=1)
        largest_end = tl.max(tl.where(at_end, largest, float("-inf")), axis=1)
        starts_all, decay_all, largest_all = tl.associative_scan((starts_end, decay_end, largest_end), 0, _then)
        m_after = tl.where(starts_all == 0, tl.maximum(m_before_block + decay_all, largest_all), largest_all)
        # The stabiliser before each chunk is that after the one before it.
        is_before = chunks[None, :] == (chunks - 1)[:, None]
        m_before = tl.sum(tl.where(is_before, m_after[None, :], 0.0), axis=1)
        m_before = tl.where(chunks == 0, m_before_block, m_before)
        if not EXPONENTIAL:
            m_before = tl.zeros([CB], dtype=tl.float64)
            m_after = tl.zeros([CB], dtype=tl.float64)

        m = tl.where(starts == 0, tl.maximum(m_before[:, None] + decay, largest), largest)
        if not EXPONENTIAL:
            m = tl.zeros([CB, L], dtype=tl.float64)
        carry = tl.where(starts == 0, tl.exp2((decay + m_before[:, None] - m).to(tl.float32)), 0.0)
        stays = starts == starts_end[:, None]
        added = tl.where(
            stays, tl.exp2((decay_end[:, None] - decay + log_input - m_after[:, None]).to(tl.float32)), 0.0
        )
        here = weights + token
        inside = (first_chunk + chunks < NC)[:, None] & (places >= 0)[None, :]
        row_log = decay - m
        col_log = log_input - decay
        row_high = row_log.to(tl.float32)
        col_high = col_log.to(tl.float32)
        # The rest of a shut gate, infinity less infinity, is nothing.
        col_rest = tl.where(col_log > float("-inf"), (col_log - col_high).to(tl.float32), 0.0)
        tl.store(here, row_high, mask=inside)
        tl.store(here + row_stride, col_high, mask=inside)
        tl.store(here + 5 * row_stride, (row_log - row_high).to(tl.float32), mask=inside)
        tl.store(here + 6 * row_stride, col_rest, mask=inside)
        tl.store(here + 2 * row_stride, carry, mask=inside)
        tl.store(here + 3 * row_stride, added, mask=inside)
        tl.store(here + 4 * row_stride, tl.exp2((-m).to(tl.float32)), mask=inside)
        kept = tl.where(starts_end == 0, tl.exp2((decay_end + m_before - m_after).to(tl.float32)), 0.0)
        tl.store(chunk_decay + first_chunk + chunks, kept, mask=first_chunk + chunks < NC)
        m_before_block = tl.sum(tl.where(chunks == CB - 1, m_after, 0.0))
    # Tokens behind the last one change nothing: their input gates are shut and their forget gates open.
    tl.store(m_final + pid, (m_before_block / LOG2_E).to(tl.float32))


@triton.jit
def _sum_until_start(left_ends, left_sum, right_ends, right_sum):
    """As _then, for plain sums."""
    return left_ends + right_ends, tl.where(right_ends == 0, left_sum + right_sum, right_sum)


@triton.jit(do_not_specialize=["S", "NH", "NC", "part_stride"])
def gate_gradients_kernel(
    weight_sums,
    query_products,
    key_products,
    chunk_decay,
    final_products,
    igate,
    fgate,
    document_start,
    grad_igate,
    grad_fgate,
    S,
    NH,
    NC,
    part_stride,
    negligible_decay,
    SUM_PARTS: tl.constexpr,
    QUERY_PARTS: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    L: tl.constexpr,
    CB: tl.constexpr,
):
    """Gradients of the gates, one program for each sequence and head.

    The log weight of token s at token t gets the gradient G[t, s]. The log input gate of token s gets the sum of G
    over t, and the log forget gate of token j the sum of G over t >= j > s: that is the sum over the tokens t >= j of
    the document of (the sum of G[t, s] over s < t) - (the sum of G[u, t] over u > t), plus the product of the state
    behind the last token with its gradient, if the document lasts that long. Inside a chunk the sums come from
    weight_sums (scores.py), across chunks from query_products and key_products (backward.py).

    What spans a whole chunk is the difference of sums that do not, so it is known to their rounding only. Where the
    chunk's decay is below negligible_decay it is taken as nothing, and the rounding of later chunks ends there.
    """
    pid = tl.program_id(0)
    batch = (pid // NH).to(tl.int64)
    head = pid % NH
    gate_offset = batch * S * NH + head
    igate += gate_offset
    fgate += gate_offset
    grad_igate += gate_offset
    grad_fgate += gate_offset
    weight_sums += pid.to(tl.int64) * NC * L
    query_products += pid.to(tl.int64) * NC * L
    key_products += pid.to(tl.int64) * NC * L
    chunk_decay += pid.to(tl.int64) * NC
    chunks = tl.arange(0, CB)
    places = tl.arange(0, L)
    part_stride = part_stride.to(tl.int64)
    # The sum of G over everything from this chunk on as readers and everything before it as sources.
    across = 0.0
    if HAS_FINAL:
        across = tl.load(final_products + pid)
    n_blocks = tl.cdiv(NC, CB)
    for step in range(n_blocks):
        chunk = (n_blocks - 1 - step) * CB + chunks
        token = (chunk * L)[:, None] + places[None, :]
        valid = token < S
        offset = token.to(tl.int64) * NH
        by_memory = tl.zeros([CB, L], dtype=tl.float32)
        for part in tl.static_range(QUERY_PARTS):
            by_memory += tl.load(query_products + part * part_stride + token, mask=valid, other=0.0)
        to_memory = tl.zeros([CB, L], dtype=tl.float32)
        for part in tl.static_range(KEY_PARTS):
            to_memory += tl.load(key_products + part * part_stride + token, mask=valid, other=0.0)
        as_source = to_memory
        for part in tl.static_range(SUM_PARTS):
            as_source += tl.load(weight_sums + (2 + part) * part_stride + token, mask=valid, other=0.0)
        as_reader = by_memory + tl.load(weight_sums + part_stride + token, mask=valid, other=0.0)
        grad_log_input = as_source + tl.load(weight_sums + token, mask=valid, other=0.0)
        ends = tl.zeros([CB, L], dtype=tl.float32)
        if HAS_STARTS:
            starts_next = tl.load(document_start + batch * S + token + 1, mask=token + 1 < S, other=0)
            # A chunk ends no document: what its memory gives to the next one is part of to_memory.
            ends = tl.where(places[None, :] < L - 1, starts_next.to(tl.float32), 0.0)
        ends, inside = tl.associative_scan((ends, as_reader - as_source), 1, _sum_until_start, reverse=True)

        decay = tl.load(chunk_decay + chunk, mask=chunk < NC, other=1.0)
        alone = (decay < negligible_decay) | ((chunk == 0) & (not HAS_INITIAL))
        given = tl.sum(to_memory, axis=1)
        taken = tl.sum(by_memory, axis=1)
        # `across` before each chunk, and from it that behind each, in use.
        alone_after, before = tl.associative_scan(
            (tl.where(alone, 1.0, 0.0), tl.where(alone, taken, taken - given)), 0, _sum_until_start, reverse=True
        )
        before = tl.where(alone_after == 0, before + across, before)
        is_next = chunks[None, :] == (chunks + 1)[:, None]
        behind = tl.sum(tl.where(is_next, before[None, :], 0.0), axis=1)
        behind = tl.where(chunks == CB - 1, across, behind)
        behind = tl.where(alone, given, behind)
        across = tl.sum(tl.where(chunks == 0, before, 0.0))

        grad_log_forget = tl.where(ends == 0, inside + behind[:, None], inside)
        # The forget gate of a document's first token multiplies an empty memory.
        idle = valid & (token == 0) if not HAS_INITIAL else valid & (token < 0)
        if HAS_STARTS:
            starts = tl.load(document_start + batch * S + token, mask=valid, other=0)
            idle = idle | (starts != 0)
        f = tl.load(fgate + offset, mask=valid, other=0.0).to(tl.float32)
        grad_f = tl.where(idle, 0.0, grad_log_forget * _sigmoid(-f))
        if EXPONENTIAL:
            grad_i = grad_log_input
        else:
            grad_i = grad_log_input * _sigmoid(-tl.load(igate + offset, mask=valid, other=0.0).to(tl.float32))
        tl.store(grad_igate + offset, grad_i, mask=valid)
        tl.store(grad_fgate + offset, grad_f, mask=valid)

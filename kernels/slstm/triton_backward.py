"""The sLSTM backward pass as one Triton kernel, with the teams of the forward pass.

A program owns UNITS units: it turns the gradient of their h into those of their pre-activations, multiplies these with
its share of the recurrent weights, and hands every member of the team what that adds to the gradient of the member's h.
The sums run in the order of the members. The gradient of the weights is left to one matrix product after the loop.

Axes: B batch, S sequence, NH heads, DH dimension of a head; tiles are [units, rows] with rows of the batch.
"""

import triton
import triton.language as tl

from kernels.slstm.triton_exchange import (
    as_loaded,
    await_words,
    halves,
    patience,
    product,
    sent_dtype,
    to_send,
    unscale,
)
from kernels.slstm.triton_forward import AVERAGE, CELL, FORGET, INPUT_SLOPE, KEPT, OUTPUT, OUTPUT_GATE, SHARE


@triton.jit
def join_gates(i, f, z, o, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """i, f, z, o [UNITS, ROWS] -> [4 * UNITS, ROWS] with the gate slower."""
    x = tl.join(tl.join(i, z), tl.join(f, o))
    return x.reshape(UNITS, ROWS, 4).permute(2, 0, 1).reshape(4 * UNITS, ROWS)


@triton.jit
def load_derivatives(here, D: tl.constexpr, mask, HAS_CAP: tl.constexpr):
    """What the forward pass kept of a token: all kinds in its order; the last stands for nothing without HAS_CAP."""
    output = tl.load(here + OUTPUT * D, mask, other=0.0)
    cell = tl.load(here + CELL * D, mask, other=0.0)
    output_gate = tl.load(here + OUTPUT_GATE * D, mask, other=0.0)
    average = tl.load(here + AVERAGE * D, mask, other=0.0)
    share = tl.load(here + SHARE * D, mask, other=0.0)
    kept = tl.load(here + KEPT * D, mask, other=0.0)
    forget = tl.load(here + FORGET * D, mask, other=0.0)
    slope = share
    if HAS_CAP:
        slope = tl.load(here + INPUT_SLOPE * D, mask, other=0.0)
    return output, cell, output_gate, average, share, kept, forget, slope


@triton.jit(do_not_specialize=["batch", "length", "teams"])
def slstm_backward_kernel(
    grad_h,
    recurrent_kernel,
    document_start,
    derivatives,
    last_grad_h,
    last_grad_average,
    last_grad_log_n,
    messages,
    grad_gates,
    initial_grad_average,
    initial_grad_log_n,
    batch,
    length,
    teams,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TEAM: tl.constexpr,
    TEAM_BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    NARROW: tl.constexpr,
    WARPS: tl.constexpr,
):
    """`teams` teams take the pairs of a head and ROWS sequences in turn. Grid: (teams * TEAM,).

    grad_h [B, S, NH, DH]; recurrent_kernel, document_start, derivatives as in the forward kernel; last_grad_h,
    last_grad_average (of y = c / n) and last_grad_log_n (of l = m + log n) [B, NH, DH] float32: through the state after
    the last token; initial_grad_*: of the state before the first. messages [2, teams, TEAM, WIDTH * ROWS], zeros:
    slot, team, sender, then the tile of each receiver; in bfloat16 if NARROW, else in float32. TEAM_BLOCK is TEAM
    rounded up to a power of two. grad_gates [B, S, 4, NH, DH].
    """
    team = tl.program_id(0) // TEAM
    member = tl.program_id(0) % TEAM
    units = member * UNITS + tl.arange(0, UNITS)
    inner = tl.arange(0, WIDTH)
    gate_units = tl.arange(0, 4 * UNITS)
    of_gate = gate_units // UNITS
    of_unit = member * UNITS + gate_units % UNITS
    members = tl.arange(0, TEAM_BLOCK)
    columns = tl.arange(0, ROWS)
    D: tl.constexpr = HEADS * HEAD_DIM
    KINDS: tl.constexpr = 8 if HAS_CAP else 7
    MESSAGE: tl.constexpr = WIDTH * ROWS
    dtype: tl.constexpr = recurrent_kernel.dtype.element_ty

    sent_as: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    on_way: tl.constexpr = sent_dtype(sent_as)
    # A message to a member is contiguous: [rows, units]. A thread reads the same part of it from every sender.
    WORDS_OF_MESSAGE: tl.constexpr = ROWS * UNITS * on_way.primitive_bitwidth // 32
    EACH: tl.constexpr = WORDS_OF_MESSAGE // (32 * WARPS)
    WORDS: tl.constexpr = 4 if EACH >= 4 else 2 if EACH >= 2 else 1
    SLOT_WORDS: tl.constexpr = TEAM * MESSAGE * on_way.primitive_bitwidth // 32
    slots = messages.to(tl.pointer_type(on_way))
    sent = (
        slots
        + (team * TEAM + member) * MESSAGE
        + (inner // UNITS * (ROWS * UNITS) + inner % UNITS)[:, None]
        + columns[None, :] * UNITS
    )
    slot_words = (slots + (team * TEAM + tl.where(members < TEAM, members, 0)[:, None]) * MESSAGE).to(
        tl.pointer_type(tl.int32)
    )
    slot_words += member * WORDS_OF_MESSAGE + tl.arange(0, WORDS_OF_MESSAGE // WORDS)[None, :] * WORDS
    # The number of exchanges so far.
    turn = 0
    for item in range(team, tl.cdiv(batch, ROWS) * HEADS, teams):
        head = item % HEADS
        rows = (item // HEADS * ROWS + columns).to(tl.int64)
        mask = (units < HEAD_DIM)[:, None] & (rows < batch)[None, :]
        weights = tl.load(
            recurrent_kernel
            + (head * HEAD_DIM + inner[:, None]) * 4 * HEAD_DIM
            + (of_gate * HEAD_DIM + of_unit)[None, :],
            (inner < HEAD_DIM)[:, None] & (of_unit < HEAD_DIM)[None, :],
            other=0.0,
        )
        state_offsets = rows[None, :] * D + head * HEAD_DIM + units[:, None]
        from_later = tl.load(last_grad_h + state_offsets, mask, other=0.0)
        grad_average = tl.load(last_grad_average + state_offsets, mask, other=0.0)
        grad_log_n = tl.load(last_grad_log_n + state_offsets, mask, other=0.0)

        if TEAM > 1:
            received = as_loaded(slot_words, messages.to(tl.pointer_type(tl.int32)), batch)
        first = rows[None, :] * length + (length - 1)
        here = derivatives + first * (KINDS * D) + head * HEAD_DIM + units[:, None]
        grad_h_here = grad_h + first * D + head * HEAD_DIM + units[:, None]
        grad_gates_here = grad_gates + first * (4 * D) + head * HEAD_DIM + units[:, None]
        starts_here = document_start + rows * length + (length - 1)

        next_grad = tl.load(grad_h_here, mask, other=0.0)
        next_output, next_cell, next_output_gate, next_average, next_share, next_kept, next_forget, next_slope = (
            load_derivatives(here, D, mask, HAS_CAP)
        )
        next_start = rows < 0
        if HAS_STARTS:
            next_start = tl.load(starts_here, rows < batch, other=0) != 0
        later_start = rows < 0
        if TEAM > 1:
            deadline = patience()
        for step in range(length):
            grad, to_output, to_cell, to_output_gate = next_grad, next_output, next_cell, next_output_gate
            to_average, share, kept, to_forget = next_average, next_share, next_kept, next_forget
            slope, start = next_slope, next_start
            if TEAM > 1:
                # Without an exchange yet nothing is read.
                last = turn - 1
                words = await_words(
                    received + (last & 1) * teams * SLOT_WORDS,
                    (last >> 1) & 1 ^ 1,
                    step > 0,
                    deadline,
                    sent_as,
                    WORDS,
                    WARPS,
                )
                if TEAM < TEAM_BLOCK:
                    words = tl.where((members < TEAM)[:, None], words, 0)
                if NARROW:
                    lower, upper = halves(words)
                    exchanged = tl.join(tl.sum(lower, 0), tl.sum(upper, 0))
                else:
                    exchanged = tl.sum(words.to(tl.float32, bitcast=True), 0)
                exchanged = exchanged.reshape(ROWS, UNITS).trans() * unscale(sent_as)
                from_later = tl.where(step > 0, exchanged, from_later)
            if HAS_STARTS:
                from_later = tl.where(later_start[None, :], 0.0, from_later)
                later_start = start
            grad_here = grad.to(tl.float32) + from_later
            grad_average += grad_here * to_output
            through_average = grad_average * to_average
            grad_i = through_average + grad_log_n * share
            if HAS_CAP:
                grad_i *= slope
            grad_log_n = grad_log_n * kept - through_average
            grad_f = grad_log_n * to_forget
            grad_z = grad_average * to_cell
            grad_o = grad_here * to_output_gate
            grad_average = grad_average * kept

            if step + 1 < length:
                joined = join_gates(grad_i.to(dtype), grad_f.to(dtype), grad_z.to(dtype), grad_o.to(dtype), UNITS, ROWS)
                to_earlier = product(weights, joined)
                if TEAM == 1:
                    from_later = to_earlier
                else:
                    tl.store(
                        sent + (turn & 1) * teams * (TEAM * MESSAGE), to_send(to_earlier, (turn >> 1) & 1 ^ 1, sent_as)
                    )
                    turn += 1
            # The inputs of the token before are on their way while this one's results are written and while it waits.
            here -= KINDS * D
            grad_h_here -= D
            starts_here -= 1
            next_mask = mask & (step + 1 < length)
            next_grad = tl.load(grad_h_here, next_mask, other=0.0)
            next_output, next_cell, next_output_gate, next_average, next_share, next_kept, next_forget, next_slope = (
                load_derivatives(here, D, next_mask, HAS_CAP)
            )
            if HAS_STARTS:
                next_start = tl.load(starts_here, (rows < batch) & (step + 1 < length), other=0) != 0

            tl.store(grad_gates_here, grad_i, mask)
            tl.store(grad_gates_here + D, grad_f, mask)
            tl.store(grad_gates_here + 2 * D, grad_z, mask)
            tl.store(grad_gates_here + 3 * D, grad_o, mask)
            grad_gates_here -= 4 * D

        tl.store(initial_grad_average + state_offsets, grad_average, mask)
        tl.store(initial_grad_log_n + state_offsets, grad_log_n, mask)

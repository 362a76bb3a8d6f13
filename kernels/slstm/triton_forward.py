"""The sLSTM forward pass as one Triton kernel that holds the recurrent weights on chip for the whole sequence.

A team of TEAM programs owns one head for ROWS sequences of the batch; each program owns UNITS units with all four
gates. At each token a program multiplies its weights with the whole h of the token before, and writes its units of the
new h, where the others read them. With TEAM = 1 nothing is exchanged.

Axes: B batch, S sequence, NH heads, DH dimension of a head; tiles are [units, rows] with rows of the batch.
"""

import triton
import triton.language as tl

from kernels.slstm.triton_exchange import (
    ONE_BY_ONE,
    as_loaded,
    await_words,
    patience,
    product,
    sent_dtype,
    to_send,
    unscale,
)

# What the backward pass needs of each token, in this order; all lie in [-2, 2]. The memory is an average of tanh(z):
# with y = c / n, l = m + log n, SHARE = exp(i - l) and KEPT = 1 - SHARE, y <- KEPT y + SHARE tanh(z), h = sigmoid(o) y.
# So dy += dh OUTPUT; dz = dy CELL; do = dh OUTPUT_GATE; g = dy AVERAGE; di = (g + dl SHARE) INPUT_SLOPE;
# dl <- dl KEPT - g; df = dl FORGET; dy <- dy KEPT.
OUTPUT, CELL, OUTPUT_GATE, AVERAGE, SHARE, KEPT, FORGET, INPUT_SLOPE = (tl.constexpr(k) for k in range(8))


@triton.jit
def tanh(x):
    """Through exp(-2 |x|), which cannot overflow."""
    small = tl.exp(-2 * tl.abs(x))
    magnitude = (1 - small) / (1 + small)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def log_sigmoid(x):
    """min(x, 0) - log(1 + exp(-|x|)): finite wherever x is."""
    return tl.minimum(x, 0.0) - tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def load_gates(here, gate_stride, mask):
    """The pre-activations i, f, z, o of a token."""
    i = tl.load(here, mask, other=0.0)
    f = tl.load(here + gate_stride, mask, other=0.0)
    z = tl.load(here + 2 * gate_stride, mask, other=0.0)
    o = tl.load(here + 3 * gate_stride, mask, other=0.0)
    return i, f, z, o


@triton.jit
def split_gates(x, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """[4 * UNITS, ROWS] with the gate slower -> i, f, z, o [UNITS, ROWS]."""
    x = x.reshape(4, UNITS, ROWS).permute(1, 2, 0).reshape(UNITS, ROWS, 2, 2)
    i_and_z, f_and_o = tl.split(x)
    i, z = tl.split(i_and_z)
    f, o = tl.split(f_and_o)
    return i, f, z, o


@triton.jit(do_not_specialize=["batch", "length", "teams"])
def slstm_forward_kernel(
    gates_x,
    recurrent_kernel,
    document_start,
    initial_h,
    initial_c,
    initial_n,
    initial_m,
    mixed_h,
    messages,
    h,
    derivatives,
    last_h,
    last_c,
    last_n,
    last_m,
    cap,
    batch,
    length,
    teams,
    gates_stride_b,
    gates_stride_s,
    gates_stride_gate,
    gates_stride_head,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TEAM: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WITH_DERIVATIVES: tl.constexpr,
    WITH_H: tl.constexpr,
    WARPS: tl.constexpr,
):
    """`teams` teams take the pairs of a head and ROWS sequences in turn. Grid: (teams * TEAM,).

    gates_x [B, S, 4, NH, DH] (last stride 1); recurrent_kernel [NH, DH, 4, DH], contiguous, in the dtype of the matrix
    products; document_start [B, S] int8; initial_h [B, NH, DH] in that dtype, initial_c, n, m [B, NH, DH] float32.
    mixed_h [B, S, NH, DH] is the h that the next token sees, in that dtype; messages [2, teams, ROWS * WIDTH], zeros,
    the same as numbers on their way: slot, team, row, unit; h is the same in
    the dtype of the result (WITH_H); derivatives [B, S, K, NH, DH], K = 8 with a cap and 7 without, in that dtype too;
    last_* [B, NH, DH] float32.
    """
    team = tl.program_id(0) // TEAM
    units = tl.program_id(0) % TEAM * UNITS + tl.arange(0, UNITS)
    inner = tl.arange(0, WIDTH)
    gate_units = tl.arange(0, 4 * UNITS)
    of_gate = gate_units // UNITS
    of_unit = tl.program_id(0) % TEAM * UNITS + gate_units % UNITS
    D: tl.constexpr = HEADS * HEAD_DIM
    KINDS: tl.constexpr = 8 if HAS_CAP else 7
    dtype: tl.constexpr = mixed_h.dtype.element_ty
    on_way: tl.constexpr = sent_dtype(dtype)
    SCALE: tl.constexpr = unscale(dtype) if TEAM > 1 else 1.0
    # Vectors of 16 bytes; those of units that nobody owns are read from where some are.
    VECTOR: tl.constexpr = 128 // on_way.primitive_bitwidth
    vectors = tl.arange(0, WIDTH // VECTOR) * VECTOR
    vectors = tl.where(vectors < TEAM * UNITS, vectors, 0)
    columns = tl.arange(0, ROWS)
    slots = messages.to(tl.pointer_type(on_way)) + team * (ROWS * WIDTH)
    sent = slots + columns[None, :] * WIDTH + units[:, None]
    slot_words = (slots + columns[:, None] * WIDTH + vectors[None, :]).to(tl.pointer_type(tl.int32))
    SLOT_WORDS: tl.constexpr = ROWS * WIDTH * on_way.primitive_bitwidth // 32
    # The number of exchanges so far.
    turn = 0

    for item in range(team, tl.cdiv(batch, ROWS) * HEADS, teams):
        head = item % HEADS
        rows = (item // HEADS * ROWS + columns).to(tl.int64)
        mask = (units < HEAD_DIM)[:, None] & (rows < batch)[None, :]
        weights = tl.load(
            recurrent_kernel
            + (head * HEAD_DIM + inner[None, :]) * 4 * HEAD_DIM
            + (of_gate * HEAD_DIM + of_unit)[:, None],
            (inner < HEAD_DIM)[None, :] & (of_unit < HEAD_DIM)[:, None],
            other=0.0,
        )
        state_offsets = rows[None, :] * D + head * HEAD_DIM + units[:, None]
        c = tl.load(initial_c + state_offsets, mask, other=0.0)
        n = tl.load(initial_n + state_offsets, mask, other=0.0)
        m = tl.load(initial_m + state_offsets, mask, other=0.0)
        average = tl.where(n > 0, c / n, 0.0)
        output = tl.load(initial_h + state_offsets, mask, other=0.0).to(tl.float32)

        if TEAM > 1:
            received = as_loaded(slot_words, messages.to(tl.pointer_type(tl.int32)), batch)
        gates_here = gates_x + rows[None, :] * gates_stride_b + head * gates_stride_head + units[:, None]
        starts_here = document_start + rows * length
        h_offsets = rows[None, :] * length * D + head * HEAD_DIM + units[:, None]
        derivatives_here = derivatives + rows[None, :] * length * (KINDS * D) + head * HEAD_DIM + units[:, None]
        next_i, next_f, next_z, next_o = load_gates(gates_here, gates_stride_gate, mask)
        next_start = rows < 0
        if HAS_STARTS:
            next_start = tl.load(starts_here, rows < batch, other=0) != 0
        if TEAM > 1:
            deadline = patience()
            to_slot = (turn & 1) * teams * (ROWS * WIDTH)
            if ONE_BY_ONE:
                # The first program needs what others would have sent; with one token nothing else is exchanged.
                known = (inner < HEAD_DIM)[:, None] & (rows < batch)[None, :]
                whole = tl.load(initial_h + rows[None, :] * D + head * HEAD_DIM + inner[:, None], known, other=0.0)
                everyone = slots + columns[None, :] * WIDTH + inner[:, None]
                tl.store(everyone + to_slot, to_send(whole.to(tl.float32), (turn >> 1) & 1 ^ 1, dtype))
            else:
                tl.store(sent + to_slot, to_send(output, (turn >> 1) & 1 ^ 1, dtype))
            turn += 1
        for t in range(length):
            x_i, x_f, x_z, x_o, start = next_i, next_f, next_z, next_o, next_start
            if TEAM == 1:
                before = output.to(dtype)
            else:
                last = turn - 1
                words = await_words(
                    received + (last & 1) * teams * SLOT_WORDS, (last >> 1) & 1 ^ 1, True, deadline, dtype, 4, WARPS
                )
                if dtype == tl.bfloat16:
                    pairs = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
                    # Triton 3.6 aborts where a matrix product takes what reshape returns.
                    before = pairs.reshape(ROWS, WIDTH).to(dtype, bitcast=True).trans()
                else:
                    before = words.to(tl.float32, bitcast=True).to(dtype).trans()
            if HAS_STARTS:
                before = tl.where(start[None, :], 0.0, before).to(dtype)
                c = tl.where(start[None, :], 0.0, c)
                n = tl.where(start[None, :], 0.0, n)
                average = tl.where(start[None, :], 0.0, average)
                m = tl.where(start[None, :], float("-inf"), m)
            recurrent = product(weights, before)
            i, f, z, o = split_gates(recurrent, UNITS, ROWS)
            i = i * SCALE + x_i
            f = f * SCALE + x_f
            z = tanh(z * SCALE + x_z)
            o = tl.sigmoid(o * SCALE + x_o)
            if HAS_CAP:
                i = cap * tanh(i / cap)
                f = cap * tanh(f / cap)
            kept = log_sigmoid(f) + m
            m = tl.maximum(kept, i)
            input_weight = tl.exp(i - m)
            memory_weight = tl.exp(kept - m)
            c = memory_weight * c + input_weight * z
            kept_n = memory_weight * n
            n = kept_n + input_weight
            average_before = average
            average = c / n
            output = o * average

            if TEAM > 1:
                if t + 1 < length:
                    tl.store(sent + (turn & 1) * teams * (ROWS * WIDTH), to_send(output, (turn >> 1) & 1 ^ 1, dtype))
                    turn += 1
                # The others wait for this; nothing that follows may come before it.
                tl.debug_barrier()
            # The next token's inputs are on their way while the rest is written, and while it waits for the others.
            gates_here += gates_stride_s
            starts_here += 1
            next_mask = mask & (t + 1 < length)
            next_i, next_f, next_z, next_o = load_gates(gates_here, gates_stride_gate, next_mask)
            if HAS_STARTS:
                next_start = tl.load(starts_here, (rows < batch) & (t + 1 < length), other=0) != 0

            tl.store(mixed_h + h_offsets, output.to(dtype), mask)
            if WITH_H:
                tl.store(h + h_offsets, output, mask)
            h_offsets += D
            if WITH_DERIVATIVES:
                # Both from their own numerators: one of them may be too small to be 1 less the other.
                share, kept_share = input_weight / n, kept_n / n
                slope = tl.sigmoid(-f)
                if HAS_CAP:
                    slope *= 1 - (f / cap) * (f / cap)
                    tl.store(derivatives_here + INPUT_SLOPE * D, 1 - (i / cap) * (i / cap), mask)
                tl.store(derivatives_here + OUTPUT * D, o, mask)
                tl.store(derivatives_here + CELL * D, share * (1 - z * z), mask)
                tl.store(derivatives_here + OUTPUT_GATE * D, output * (1 - o), mask)
                tl.store(derivatives_here + AVERAGE * D, share * kept_share * (z - average_before), mask)
                tl.store(derivatives_here + SHARE * D, share, mask)
                tl.store(derivatives_here + KEPT * D, kept_share, mask)
                tl.store(derivatives_here + FORGET * D, slope, mask)
                derivatives_here += KINDS * D

        tl.store(last_h + state_offsets, output, mask)
        tl.store(last_c + state_offsets, c, mask)
        tl.store(last_n + state_offsets, n, mask)
        tl.store(last_m + state_offsets, m, mask)

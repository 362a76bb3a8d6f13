"""The Triton kernels of the head norm and the gate behind it: each tensor is read once and written once, both ways.

Axes: T tokens (B * S), NH heads, DV value dimension of a head.
"""

import triton
import triton.language as tl


@triton.jit
def _normalise(h, row_inside, column_inside, eps, DV: tl.constexpr):
    """Rows of h -> the same with mean 0 and variance 1 (0 outside), and 1 / their standard deviation [rows, 1].

    h is 0 outside.
    """
    centred = h - tl.sum(h, 1)[:, None] / DV
    if h.shape[1] > DV:
        centred = tl.where(column_inside, centred, 0.0)
    variance = tl.sum(centred * centred, 1)[:, None] / DV
    scale = tl.where(row_inside, tl.rsqrt(variance + eps), 0.0)
    return centred * scale, scale


@triton.jit
def _norm_gradient(grad, normalised, scale, DV: tl.constexpr):
    """The gradient of h from that of the normalised rows (both 0 outside)."""
    mean = tl.sum(grad, 1)[:, None] / DV
    projection = tl.sum(grad * normalised, 1)[:, None] / DV
    return scale * (grad - mean - normalised * projection)


@triton.jit
def _tile(first_token, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Token numbers [ROWS, 1] (64 bits, for offsets) and columns [1, WIDTH]."""
    return first_token.to(tl.int64) + tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]


@triton.jit
def _load(x, offsets, inside):
    return tl.load(x + offsets, inside, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    h,
    gate_preact,
    weight,
    y,
    tokens,
    h_token,
    h_head,
    gate_token,
    eps,
    NH: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    head = tl.program_id(0) % NH
    token, column = _tile(tl.program_id(0) // NH * ROWS, ROWS, WIDTH)
    row_inside, column_inside = token < tokens, column < DV
    inside = row_inside & column_inside
    channel = head * DV + column
    h_tile = _load(h, token * h_token + head.to(tl.int64) * h_head + column, inside)
    y_tile, _ = _normalise(h_tile, row_inside, column_inside, eps, DV)
    if gate_preact is not None:
        y_tile *= tl.sigmoid(_load(gate_preact, token * gate_token + channel, inside))
    tl.store(y + token * (NH * DV) + channel, y_tile * _load(weight, channel, column_inside), inside)


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    grad,
    h,
    gate_preact,
    weight,
    grad_h,
    grad_gate_preact,
    partials,
    tokens,
    grad_token,
    h_token,
    h_head,
    gate_token,
    eps,
    NH: tl.constexpr,
    DV: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    part = tl.program_id(0) // NH
    head = tl.program_id(0) % NH
    channels = head * DV + tl.arange(0, WIDTH)
    exists = tl.arange(0, WIDTH) < DV
    scaling = _load(weight, channels, exists)[None, :]
    grad_weight = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in tl.range(0, TOKENS, ROWS, num_stages=STAGES):
        token, column = _tile(part * TOKENS + first, ROWS, WIDTH)
        row_inside, column_inside = token < tokens, column < DV
        inside = row_inside & column_inside
        channel = head * DV + column
        grad_tile = _load(grad, token * grad_token + channel, inside)
        h_tile = _load(h, token * h_token + head.to(tl.int64) * h_head + column, inside)
        normalised, scale = _normalise(h_tile, row_inside, column_inside, eps, DV)
        if gate_preact is not None:
            gate = tl.sigmoid(_load(gate_preact, token * gate_token + channel, inside))
            grad_tile *= gate
        grad_weight += grad_tile * normalised
        grad_tile *= scaling
        if gate_preact is not None:
            grad_gate = grad_tile * normalised * (1.0 - gate)
            tl.store(grad_gate_preact + token * (NH * DV) + channel, grad_gate, inside)
        grad_input = _norm_gradient(grad_tile, normalised, scale, DV)
        tl.store(grad_h + token * (NH * DV) + channel, grad_input, inside)
    tl.store(partials + part.to(tl.int64) * (NH * DV) + channels, tl.sum(grad_weight, 0), exists)

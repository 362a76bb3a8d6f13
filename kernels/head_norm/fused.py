"""The head norm and the gate behind it as Triton kernels: each tensor is read once and written once, both ways.

The backward pass computes the statistics again from h, which it must read anyway. The gradient of the weight is summed
in two stages of fixed order, so it is the same in every run: over TOKENS_PER_PARTIAL tokens in a program, then over the
programs.

Axes: T tokens (B * S), NH heads, DV value dimension of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.integers import ceil_div, next_power_of_two

TOKENS_PER_PARTIAL = 32
# 16 elements of each tensor in a thread. A warp that has a whole row sums it without a barrier; the backward pass has
# four such sums, each of which needs the one before.
_WARP_ELEMENTS = 512
_FORWARD_WARPS, _BACKWARD_WARPS = 4, 1
# Iterations of the backward pass that are loaded ahead, plus one.
_STAGES = 3


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
def _forward(
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
def _backward(
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


def _tile_settings(head_dim: int, warps: int) -> dict[str, int]:
    width = max(16, next_power_of_two(head_dim))
    warps = max(warps, width // _WARP_ELEMENTS)
    rows = min(TOKENS_PER_PARTIAL, warps * _WARP_ELEMENTS // width)
    return {"DV": head_dim, "ROWS": rows, "WIDTH": width, "num_warps": warps}


def _by_head(h: Tensor) -> Tensor:
    """[B, S, NH, DV] -> [T, NH, DV] with adjacent elements in the last axis, without a copy where strides allow it."""
    h = h.reshape(-1, *h.shape[2:])
    return h if h.stride(-1) == 1 else h.contiguous()


def _by_token(x: Tensor) -> Tensor:
    """[B, S, NH * DV] -> [T, NH * DV], likewise."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_forward(h: Tensor, gate_preact: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """h [B, S, NH, DV], gate_preact [B, S, NH * DV] or None, weight [NH * DV] -> y [B, S, NH * DV] in h's dtype."""
    h_rows, weight = _by_head(h), weight.contiguous()
    gate_rows = None if gate_preact is None else _by_token(gate_preact)
    tokens, heads, head_dim = h_rows.shape
    y = h.new_empty(*h.shape[:2], heads * head_dim)
    settings = _tile_settings(head_dim, _FORWARD_WARPS)
    with torch.cuda.device_of(h):
        _forward[(ceil_div(tokens, settings["ROWS"]) * heads,)](
            h_rows,
            gate_rows,
            weight,
            y,
            tokens,
            h_rows.stride(0),
            h_rows.stride(1),
            0 if gate_rows is None else gate_rows.stride(0),
            eps,
            NH=heads,
            **settings,
        )
    return y


def launch_backward(
    grad: Tensor, h: Tensor, gate_preact: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of h, gate_preact and weight, in their shapes and dtypes, from that of y."""
    grad_rows, h_rows, weight = _by_token(grad), _by_head(h), weight.contiguous()
    tokens, heads, head_dim = h_rows.shape
    grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    gate_rows = grad_gate_preact = None
    if gate_preact is not None:
        gate_rows = _by_token(gate_preact)
        grad_gate_preact = torch.empty(gate_preact.shape, dtype=gate_preact.dtype, device=h.device)
    parts = ceil_div(tokens, TOKENS_PER_PARTIAL)
    partials = torch.empty(parts, heads * head_dim, dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(h):
        _backward[(parts * heads,)](
            grad_rows,
            h_rows,
            gate_rows,
            weight,
            grad_h,
            grad_gate_preact,
            partials,
            tokens,
            grad_rows.stride(0),
            h_rows.stride(0),
            h_rows.stride(1),
            0 if gate_rows is None else gate_rows.stride(0),
            eps,
            NH=heads,
            TOKENS=TOKENS_PER_PARTIAL,
            STAGES=_STAGES,
            **_tile_settings(head_dim, _BACKWARD_WARPS),
        )
    return grad_h, grad_gate_preact, partials.sum(0).to(weight.dtype)


@torch.library.custom_op("xlstm_pretrain::head_norm", mutates_args=())
def head_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As kernels.head_norm.head_norm."""
    return launch_forward(h, None, weight, eps)


@head_norm.register_fake
def _(h, weight, eps):
    return h.new_empty(*h.shape[:2], weight.shape[0])


@torch.library.custom_op("xlstm_pretrain::head_norm_backward", mutates_args=())
def _head_norm_backward(grad: Tensor, h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    grad_h, _, grad_weight = launch_backward(grad, h, None, weight, eps)
    return grad_h, grad_weight


@_head_norm_backward.register_fake
def _(grad, h, weight, eps):
    return h.new_empty(h.shape), weight.new_empty(weight.shape)


def _keep_for_norm(ctx, inputs, output):
    h, weight, ctx.eps = inputs
    ctx.save_for_backward(h, weight)


def _differentiate_norm(ctx, grad):
    return *_head_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


head_norm.register_autograd(_differentiate_norm, setup_context=_keep_for_norm)


@torch.library.custom_op("xlstm_pretrain::gated_head_norm", mutates_args=())
def gated_head_norm(h: Tensor, gate_preact: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As kernels.head_norm.gated_head_norm."""
    return launch_forward(h, gate_preact, weight, eps)


@gated_head_norm.register_fake
def _(h, gate_preact, weight, eps):
    return h.new_empty(gate_preact.shape)


@torch.library.custom_op("xlstm_pretrain::gated_head_norm_backward", mutates_args=())
def _gated_head_norm_backward(
    grad: Tensor, h: Tensor, gate_preact: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(grad, h, gate_preact, weight, eps)


@_gated_head_norm_backward.register_fake
def _(grad, h, gate_preact, weight, eps):
    return h.new_empty(h.shape), gate_preact.new_empty(gate_preact.shape), weight.new_empty(weight.shape)


def _keep_for_gated_norm(ctx, inputs, output):
    h, gate_preact, weight, ctx.eps = inputs
    ctx.save_for_backward(h, gate_preact, weight)


def _differentiate_gated_norm(ctx, grad):
    return *_gated_head_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


gated_head_norm.register_autograd(_differentiate_gated_norm, setup_context=_keep_for_gated_norm)

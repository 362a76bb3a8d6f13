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

from kernels.triton_support import next_power_of_two

TOKENS_PER_PARTIAL = 64
# Elements of one tensor that a program works on at a time; the backward pass has three tensors and a sum to hold.
_FORWARD_TILE, _BACKWARD_TILE = 2048, 1024


@triton.jit
def _normalise(h, inside, eps, DV: tl.constexpr):
    """Rows of h -> the same with mean 0 and variance 1 (0 outside), and 1 / their standard deviation [rows, 1]."""
    mean = tl.sum(h, 1)[:, None] / DV
    centred = tl.where(inside, h - mean, 0.0)
    variance = tl.sum(centred * centred, 1)[:, None] / DV
    scale = tl.rsqrt(variance + eps)
    return tl.where(inside, centred * scale, 0.0), scale


@triton.jit
def _norm_gradient(grad, normalised, scale, DV: tl.constexpr):
    """The gradient of h from that of the normalised rows (both 0 outside)."""
    mean = tl.sum(grad, 1)[:, None] / DV
    projection = tl.sum(grad * normalised, 1)[:, None] / DV
    return scale * (grad - mean - normalised * projection)


@triton.jit
def _tile(first_token, tokens, DV: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Token numbers [ROWS, 1] (64 bits, for offsets), columns [1, WIDTH] and which elements of the tile exist."""
    token = first_token.to(tl.int64) + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    return token, column, (token < tokens) & (column < DV)


@triton.jit
def _load(x, offsets, inside):
    return tl.load(x + offsets, inside, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def _norm_forward(
    h,
    weight,
    y,
    tokens,
    h_token,
    h_head,
    eps,
    NH: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    head = tl.program_id(0) % NH
    token, column, inside = _tile(tl.program_id(0) // NH * ROWS, tokens, DV, ROWS, WIDTH)
    channel = head * DV + column
    normalised, _ = _normalise(_load(h, token * h_token + head * h_head + column, inside), inside, eps, DV)
    tl.store(y + token * (NH * DV) + channel, normalised * _load(weight, channel, column < DV), inside)


@triton.jit(do_not_specialize=["tokens"])
def _gated_forward(
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
    token, column, inside = _tile(tl.program_id(0) // NH * ROWS, tokens, DV, ROWS, WIDTH)
    channel = head * DV + column
    gate = tl.sigmoid(_load(gate_preact, token * gate_token + channel, inside))
    normalised, _ = _normalise(_load(h, token * h_token + head * h_head + column, inside), inside, eps, DV)
    tl.store(y + token * (NH * DV) + channel, gate * normalised * _load(weight, channel, column < DV), inside)


@triton.jit(do_not_specialize=["tokens"])
def _norm_backward(
    grad,
    h,
    weight,
    grad_h,
    partials,
    tokens,
    grad_token,
    h_token,
    h_head,
    eps,
    NH: tl.constexpr,
    DV: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    part = tl.program_id(0) // NH
    head = tl.program_id(0) % NH
    grad_weight = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, TOKENS, ROWS):
        token, column, inside = _tile(part * TOKENS + first, tokens, DV, ROWS, WIDTH)
        channel = head * DV + column
        grad_y = _load(grad, token * grad_token + channel, inside)
        normalised, scale = _normalise(_load(h, token * h_token + head * h_head + column, inside), inside, eps, DV)
        grad_weight += grad_y * normalised
        grad_y *= _load(weight, channel, column < DV)
        tl.store(grad_h + token * (NH * DV) + channel, _norm_gradient(grad_y, normalised, scale, DV), inside)
    channel = tl.arange(0, WIDTH)
    tl.store(partials + (part * NH + head).to(tl.int64) * DV + channel, tl.sum(grad_weight, 0), channel < DV)


@triton.jit(do_not_specialize=["tokens"])
def _gated_backward(
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
):
    part = tl.program_id(0) // NH
    head = tl.program_id(0) % NH
    grad_weight = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, TOKENS, ROWS):
        token, column, inside = _tile(part * TOKENS + first, tokens, DV, ROWS, WIDTH)
        channel = head * DV + column
        grad_y = _load(grad, token * grad_token + channel, inside)
        gate = tl.sigmoid(_load(gate_preact, token * gate_token + channel, inside))
        normalised, scale = _normalise(_load(h, token * h_token + head * h_head + column, inside), inside, eps, DV)
        w = _load(weight, channel, column < DV)
        gated_grad = grad_y * gate
        grad_weight += gated_grad * normalised
        gated_grad *= w
        tl.store(grad_gate_preact + token * (NH * DV) + channel, gated_grad * normalised * (1.0 - gate), inside)
        tl.store(grad_h + token * (NH * DV) + channel, _norm_gradient(gated_grad, normalised, scale, DV), inside)
    channel = tl.arange(0, WIDTH)
    tl.store(partials + (part * NH + head).to(tl.int64) * DV + channel, tl.sum(grad_weight, 0), channel < DV)


def _tile_settings(head_dim: int, elements: int) -> dict[str, int]:
    width = max(16, next_power_of_two(head_dim))
    rows = min(TOKENS_PER_PARTIAL, max(1, elements // width))
    return {"DV": head_dim, "ROWS": rows, "WIDTH": width, "num_warps": 4 if width <= 2048 else 8}


def _by_head(h: Tensor) -> Tensor:
    """[B, S, NH, DV] -> [T, NH, DV] with adjacent elements in the last axis, without a copy where strides allow it."""
    h = h.reshape(-1, *h.shape[2:])
    return h if h.stride(-1) == 1 else h.contiguous()


def _by_token(x: Tensor) -> Tensor:
    """[B, S, NH * DV] -> [T, NH * DV], likewise."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_norm_forward(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """h [B, S, NH, DV], weight [NH * DV] -> y [B, S, NH * DV] in h's dtype."""
    h_rows, weight = _by_head(h), weight.contiguous()
    tokens, heads, head_dim = h_rows.shape
    y = h.new_empty(*h.shape[:2], heads * head_dim)
    settings = _tile_settings(head_dim, _FORWARD_TILE)
    grid = (triton.cdiv(tokens, settings["ROWS"]) * heads,)
    with torch.cuda.device_of(h):
        _norm_forward[grid](h_rows, weight, y, tokens, h_rows.stride(0), h_rows.stride(1), eps, NH=heads, **settings)
    return y


def launch_gated_forward(h: Tensor, gate_preact: Tensor, weight: Tensor, eps: float) -> Tensor:
    """h [B, S, NH, DV], gate_preact [B, S, NH * DV], weight [NH * DV] -> y [B, S, NH * DV] in h's dtype."""
    h_rows, gate_rows, weight = _by_head(h), _by_token(gate_preact), weight.contiguous()
    tokens, heads, head_dim = h_rows.shape
    y = h.new_empty(gate_preact.shape)
    settings = _tile_settings(head_dim, _FORWARD_TILE)
    grid = (triton.cdiv(tokens, settings["ROWS"]) * heads,)
    with torch.cuda.device_of(h):
        _gated_forward[grid](
            h_rows,
            gate_rows,
            weight,
            y,
            tokens,
            h_rows.stride(0),
            h_rows.stride(1),
            gate_rows.stride(0),
            eps,
            NH=heads,
            **settings,
        )
    return y


def launch_norm_backward(grad: Tensor, h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of h and weight, in their shapes and dtypes, from that of y."""
    grad_rows, h_rows, weight = _by_token(grad), _by_head(h), weight.contiguous()
    tokens, heads, head_dim = h_rows.shape
    grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    parts = triton.cdiv(tokens, TOKENS_PER_PARTIAL)
    partials = torch.empty(parts, heads * head_dim, dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(h):
        _norm_backward[(parts * heads,)](
            grad_rows,
            h_rows,
            weight,
            grad_h,
            partials,
            tokens,
            grad_rows.stride(0),
            h_rows.stride(0),
            h_rows.stride(1),
            eps,
            NH=heads,
            TOKENS=TOKENS_PER_PARTIAL,
            **_tile_settings(head_dim, _BACKWARD_TILE),
        )
    return grad_h, partials.sum(0).to(weight.dtype)


def launch_gated_backward(
    grad: Tensor, h: Tensor, gate_preact: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, gate_preact and weight, in their shapes and dtypes, from that of y."""
    grad_rows, h_rows, gate_rows, weight = _by_token(grad), _by_head(h), _by_token(gate_preact), weight.contiguous()
    tokens, heads, head_dim = h_rows.shape
    grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    grad_gate_preact = torch.empty(gate_preact.shape, dtype=gate_preact.dtype, device=h.device)
    parts = triton.cdiv(tokens, TOKENS_PER_PARTIAL)
    partials = torch.empty(parts, heads * head_dim, dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(h):
        _gated_backward[(parts * heads,)](
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
            gate_rows.stride(0),
            eps,
            NH=heads,
            TOKENS=TOKENS_PER_PARTIAL,
            **_tile_settings(head_dim, _BACKWARD_TILE),
        )
    return grad_h, grad_gate_preact, partials.sum(0).to(weight.dtype)


@torch.library.custom_op("xlstm_pretrain::head_norm", mutates_args=())
def head_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As kernels.head_norm.head_norm."""
    return launch_norm_forward(h, weight, eps)


@head_norm.register_fake
def _(h, weight, eps):
    return h.new_empty(*h.shape[:2], weight.shape[0])


@torch.library.custom_op("xlstm_pretrain::head_norm_backward", mutates_args=())
def _head_norm_backward(grad: Tensor, h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return launch_norm_backward(grad, h, weight, eps)


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
    return launch_gated_forward(h, gate_preact, weight, eps)


@gated_head_norm.register_fake
def _(h, gate_preact, weight, eps):
    return h.new_empty(gate_preact.shape)


@torch.library.custom_op("xlstm_pretrain::gated_head_norm_backward", mutates_args=())
def _gated_head_norm_backward(
    grad: Tensor, h: Tensor, gate_preact: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_gated_backward(grad, h, gate_preact, weight, eps)


@_gated_head_norm_backward.register_fake
def _(grad, h, gate_preact, weight, eps):
    return h.new_empty(h.shape), gate_preact.new_empty(gate_preact.shape), weight.new_empty(weight.shape)


def _keep_for_gated_norm(ctx, inputs, output):
    h, gate_preact, weight, ctx.eps = inputs
    ctx.save_for_backward(h, gate_preact, weight)


def _differentiate_gated_norm(ctx, grad):
    return *_gated_head_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


gated_head_norm.register_autograd(_differentiate_gated_norm, setup_context=_keep_for_gated_norm)

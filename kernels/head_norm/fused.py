"""The head norm and the gate behind it on their Triton kernels (row_kernels.py), as operators.

The backward pass computes the statistics again from h, which it must read anyway. The gradient of the weight is summed
in two stages of fixed order, so it is the same in every run: over TOKENS_PER_PARTIAL tokens in a program, then over the
programs.

Axes: T tokens (B * S), NH heads, DV value dimension of a head.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.head_norm.row_kernels import backward_kernel, forward_kernel
from kernels.integers import ceil_div, next_power_of_two

TOKENS_PER_PARTIAL = 32
# 16 elements of each tensor in a thread. A warp that has a whole row sums it without a barrier; the backward pass has
# four such sums, each of which needs the one before.
_WARP_ELEMENTS = 512
_FORWARD_WARPS, _BACKWARD_WARPS = 4, 1
# Iterations of the backward pass that are loaded ahead, plus one.
_STAGES = 3


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
        forward_kernel[(ceil_div(tokens, settings["ROWS"]) * heads,)](
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
        backward_kernel[(parts * heads,)](
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
def _(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    return h.new_empty(*h.shape[:2], weight.shape[0])


@torch.library.custom_op("xlstm_pretrain::head_norm_backward", mutates_args=())
def _head_norm_backward(grad: Tensor, h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    grad_h, _, grad_weight = launch_backward(grad, h, None, weight, eps)
    return grad_h, grad_weight


@_head_norm_backward.register_fake
def _(grad: Tensor, h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), weight.new_empty(weight.shape)


def _keep_for_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, weight, ctx.eps = inputs
    ctx.save_for_backward(h, weight)


def _differentiate_norm(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_head_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


head_norm.register_autograd(_differentiate_norm, setup_context=_keep_for_norm)


@torch.library.custom_op("xlstm_pretrain::gated_head_norm", mutates_args=())
def gated_head_norm(h: Tensor, gate_preact: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As kernels.head_norm.gated_head_norm."""
    return launch_forward(h, gate_preact, weight, eps)


@gated_head_norm.register_fake
def _(h: Tensor, gate_preact: Tensor, weight: Tensor, eps: float) -> Tensor:
    return h.new_empty(gate_preact.shape)


@torch.library.custom_op("xlstm_pretrain::gated_head_norm_backward", mutates_args=())
def _gated_head_norm_backward(
    grad: Tensor, h: Tensor, gate_preact: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_h, grad_gate_preact, grad_weight = launch_backward(grad, h, gate_preact, weight, eps)
    assert grad_gate_preact is not None
    return grad_h, grad_gate_preact, grad_weight


@_gated_head_norm_backward.register_fake
def _(grad: Tensor, h: Tensor, gate_preact: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), gate_preact.new_empty(gate_preact.shape), weight.new_empty(weight.shape)


def _keep_for_gated_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, gate_preact, weight, ctx.eps = inputs
    ctx.save_for_backward(h, gate_preact, weight)


def _differentiate_gated_norm(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_gated_head_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


gated_head_norm.register_autograd(_differentiate_gated_norm, setup_context=_keep_for_gated_norm)

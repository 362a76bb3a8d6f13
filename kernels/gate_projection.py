"""The pre-activations of gates: a few outputs a token, exact beyond the precision of the inputs.

A forget gate near 1 would lose its distance from 1 in bfloat16, and that adds up over thousands of steps, so results
are float32. Inputs in bfloat16 are multiplied on tensor cores all the same: products of two such numbers are exact in
float32, and so are the sums to its precision.

Axes: T tokens, D inputs, N gates (one for each head).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.operators import operator
from kernels.precision import autocast_disabled, compute_dtype


def gate_projection(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., D], weight [N, D], bias [N] -> x weight^T + bias [..., N] in float32 (float64 if any of them is)."""
    if on_tensor_cores(x, weight):
        product: Tensor = _project(x.flatten(0, -2), weight)
        return product.unflatten(0, x.shape[:-1]) + bias
    dtype = compute_dtype(x, weight)
    with autocast_disabled(x):
        return F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))


def on_tensor_cores(x: Tensor, weight: Tensor) -> bool:
    """Whether the product is computed from bfloat16 as it is."""
    return x.device.type == "cuda" and x.dtype == weight.dtype == torch.bfloat16


class _Gradients(NamedTuple):
    grad_x: Tensor
    grad_weight: Tensor


@operator("gate_projection")
def _project(x: Tensor, weight: Tensor) -> Tensor:
    """[T, D] and [N, D] in bfloat16 -> [T, N] in float32."""
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


@operator("gate_projection_backward")
def _gradients(grad: Tensor, x: Tensor, weight: Tensor) -> _Gradients:
    """grad [T, N] float32 -> the gradients of x and weight, each rounded to bfloat16 once.

    The gradient is the sum of two bfloat16 numbers, which hold 16 bits of its 24, side by side in one product.
    """
    high = grad.to(torch.bfloat16)
    low = (grad - high).to(torch.bfloat16)
    parts = torch.cat([high, low], dim=1)
    grad_x = torch.mm(parts, torch.cat([weight, weight]))
    by_parts = torch.mm(parts.t(), x, out_dtype=torch.float32)
    grad_high, grad_low = by_parts.chunk(2)
    return _Gradients(grad_x, (grad_high + grad_low).to(torch.bfloat16))


@_project.fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@_gradients.fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> _Gradients:
    return _Gradients(torch.empty_like(x), torch.empty_like(weight))


def _keep(ctx: Any, arguments: list[Any], result: Tensor) -> None:
    ctx.save_for_backward(*arguments)


def _differentiate(ctx: Any, grad: Tensor) -> _Gradients:
    return _gradients(grad, *ctx.saved_tensors)


_project.differentiate(_keep, _differentiate)

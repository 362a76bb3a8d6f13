"""The Triton kernels of the loss: one program turns one token's logits into its loss, and into their gradient in place.

Axes: N tokens of a chunk, V vocabulary.
"""

import triton
import triton.language as tl

from kernels.cross_entropy.reference import MASKED
from kernels.triton_soft_cap import soft_capped

_MASKED = tl.constexpr(MASKED)


@triton.jit
def _tile(LINES: tl.constexpr, LANES: tl.constexpr):
    return tl.arange(0, LINES)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _log_sum_exp(row, V, cap, HAS_CAP: tl.constexpr, LINES: tl.constexpr, LANES: tl.constexpr):
    largest = tl.full([LANES], -1e30, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for first in range(0, V, LINES * LANES):
        column = first + _tile(LINES, LANES)
        logits, _ = soft_capped(tl.load(row + column, column < V, 0.0).to(tl.float32), cap, HAS_CAP)
        logits = tl.where(column < V, logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger[None, :]), 0)
        largest = larger
    maximum = tl.max(largest, 0)
    return maximum + tl.log(tl.sum(total * tl.exp(largest - maximum), 0))


@triton.jit
def _store_loss(row, target, log_sum, loss, cap, z_loss_weight, HAS_CAP: tl.constexpr):
    target_logit, _ = soft_capped(tl.load(row + target).to(tl.float32), cap, HAS_CAP)
    tl.store(loss, log_sum - target_logit + z_loss_weight * log_sum * log_sum)


@triton.jit
def _store_gradient(
    row, target, log_sum, scale, V, cap, z_loss_weight, HAS_CAP: tl.constexpr, LINES: tl.constexpr, LANES: tl.constexpr
):
    softmax_scale = 1.0 + 2.0 * z_loss_weight * log_sum
    for first in range(0, V, LINES * LANES):
        column = first + _tile(LINES, LANES)
        logits, slope = soft_capped(tl.load(row + column, column < V, 0.0).to(tl.float32), cap, HAS_CAP)
        gradient = softmax_scale * tl.exp(logits - log_sum) - tl.where(column == target, 1.0, 0.0)
        tl.store(row + column, gradient * slope * scale, column < V)


@triton.jit
def _store_zeros(row, V, LINES: tl.constexpr, LANES: tl.constexpr):
    for first in range(0, V, LINES * LANES):
        column = first + _tile(LINES, LANES)
        tl.store(row + column, tl.zeros([LINES, LANES], tl.float32), column < V)


@triton.jit
def _own_token(logits, targets, row_stride):
    """The token of this program, its logits and its target."""
    token = tl.program_id(0)
    return token, logits + token.to(tl.int64) * row_stride, tl.load(targets + token)


@triton.jit
def losses_kernel(
    logits,
    targets,
    losses,
    log_sums,
    V,
    row_stride,
    cap,
    z_loss_weight,
    HAS_CAP: tl.constexpr,
    LINES: tl.constexpr,
    LANES: tl.constexpr,
):
    token, row, target = _own_token(logits, targets, row_stride)
    if target == _MASKED:
        tl.store(losses + token, 0.0)
        tl.store(log_sums + token, 0.0)
    else:
        log_sum = _log_sum_exp(row, V, cap, HAS_CAP, LINES, LANES)
        tl.store(log_sums + token, log_sum)
        _store_loss(row, target, log_sum, losses + token, cap, z_loss_weight, HAS_CAP)


@triton.jit
def gradients_kernel(
    logits,
    targets,
    log_sums,
    scales,
    V,
    row_stride,
    cap,
    z_loss_weight,
    HAS_CAP: tl.constexpr,
    LINES: tl.constexpr,
    LANES: tl.constexpr,
):
    token, row, target = _own_token(logits, targets, row_stride)
    if target == _MASKED:
        _store_zeros(row, V, LINES, LANES)
    else:
        log_sum, scale = tl.load(log_sums + token), tl.load(scales + token)
        _store_gradient(row, target, log_sum, scale, V, cap, z_loss_weight, HAS_CAP, LINES, LANES)


@triton.jit
def losses_and_gradients_kernel(
    logits,
    targets,
    losses,
    V,
    row_stride,
    cap,
    z_loss_weight,
    HAS_CAP: tl.constexpr,
    LINES: tl.constexpr,
    LANES: tl.constexpr,
):
    token, row, target = _own_token(logits, targets, row_stride)
    if target == _MASKED:
        tl.store(losses + token, 0.0)
        _store_zeros(row, V, LINES, LANES)
    else:
        log_sum = _log_sum_exp(row, V, cap, HAS_CAP, LINES, LANES)
        _store_loss(row, target, log_sum, losses + token, cap, z_loss_weight, HAS_CAP)
        # The target's logit is read before any thread overwrites it.
        tl.debug_barrier()
        _store_gradient(row, target, log_sum, 1.0, V, cap, z_loss_weight, HAS_CAP, LINES, LANES)

"""The loss in plain PyTorch: the specification, and what runs on a CPU.

Axes: N tokens, D model dimension, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.precision import autocast_disabled, compute_dtype

MASKED = -100
_CHUNK_TOKENS = 2048


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None, z_loss_weight: float, chunk_tokens: int | None
) -> Tensor:
    """As kernels.cross_entropy.linear_cross_entropy, for hidden [N, D] and targets [N] -> losses [N]."""
    return _LinearCrossEntropy.apply(hidden, weight, targets, cap, z_loss_weight, chunk_tokens or _CHUNK_TOKENS)


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden [N, D], weight [V, D], targets [N] -> losses [N]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        cap: float | None,
        z_loss_weight: float,
        chunk_tokens: int,
    ) -> Tensor:
        ctx.cap, ctx.z_loss_weight, ctx.chunk_tokens = cap, z_loss_weight, chunk_tokens
        losses, log_sums = [], []
        with autocast_disabled(hidden):
            weight_for_product = weight.to(hidden.dtype)
            for chunk, target in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
                masked = target == MASKED
                logits = _logits(chunk, weight_for_product, masked, cap)
                log_sum = torch.logsumexp(logits, dim=1)
                target_logits = logits.gather(1, target.masked_fill(masked, 0)[:, None]).squeeze(1)
                loss = log_sum - target_logits
                if z_loss_weight:
                    loss = loss + z_loss_weight * log_sum.square()
                losses.append(loss.masked_fill_(masked, 0))
                log_sums.append(log_sum)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(log_sums))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_sums = ctx.saved_tensors
        size = ctx.chunk_tokens
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=compute_dtype(hidden)) if needs_weight else None
        with autocast_disabled(hidden):
            weight_for_product = weight.to(hidden.dtype)
            for start in range(0, len(hidden), size):
                tokens = slice(start, start + size)
                target, chunk = targets[tokens], hidden[tokens]
                masked = target == MASKED
                logits = _logits(chunk, weight_for_product, masked, ctx.cap)
                grad_logits = torch.exp(logits - log_sums[tokens, None])
                if ctx.z_loss_weight:
                    grad_logits.mul_(1 + 2 * ctx.z_loss_weight * log_sums[tokens, None])
                index = target.masked_fill(masked, 0)[:, None]
                grad_logits.scatter_add_(1, index, grad_logits.new_full(index.shape, -1))
                if ctx.cap is not None:
                    # The derivative of cap * tanh(x / cap) is 1 - tanh^2, and the capped logits hold the tanh.
                    grad_logits.mul_(logits.div_(ctx.cap).square_().neg_().add_(1))
                grad_logits.mul_(grad_losses[tokens].masked_fill(masked, 0)[:, None])
                grad_product = grad_logits.to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(grad_product, weight_for_product, out=grad_hidden[tokens])
                if grad_weight is not None:
                    grad_weight += grad_product.t() @ chunk.masked_fill(masked[:, None], 0)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, masked: Tensor, cap: float | None) -> Tensor:
    """Capped logits [tokens, V] in the precision of the loss; a masked token's hidden state counts as zero."""
    # Not even a NaN in a padded position may reach the gradient of the weight.
    logits = (hidden.masked_fill(masked[:, None], 0) @ weight.t()).to(compute_dtype(hidden))
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

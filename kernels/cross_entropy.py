"""Cross-entropy straight from hidden states, without ever holding the logits of the whole batch.

Axes: B batch, S sequence, D model dimension, V vocabulary, N tokens (B * S).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.precision import autocast_disabled, compute_dtype

MASKED = -100


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, soft_cap: float | None = None, chunk_tokens: int = 2048
) -> Tensor:
    """-log softmax(soft_cap(hidden @ weight.T))[target] of every token, in nats.

    The logits of at most chunk_tokens tokens exist at a time; the backward pass computes them again. The matrix
    products run in hidden's dtype, the soft cap and the log-sum-exp in float32 (float64 for float64 inputs), and the
    gradient of the weight is summed over the chunks in that precision too.

    Args:
        hidden: [B, S, D], any floating dtype.
        weight: [V, D].
        targets: [B, S] int64 in [0, V), or -100 for a token that is not scored.
        soft_cap: bound of the logits, cap * tanh(logits / cap); None: no bound.
        chunk_tokens: how many tokens' logits to hold at a time.

    Returns:
        [B, S] float32 (float64 for float64 inputs), 0 where the target is -100.

    Raises:
        ValueError: the shapes do not fit, or a setting is not positive.
    """
    if hidden.shape[:-1] != targets.shape or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            "linear_cross_entropy needs hidden [B, S, D], weight [V, D] and targets [B, S], got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"a soft cap must be positive, not {soft_cap}; use null for no cap")
    losses = _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), soft_cap, chunk_tokens)
    return losses.view(targets.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden [N, D], weight [V, D], targets [N] -> losses [N]."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, cap, chunk_tokens):
        ctx.cap, ctx.chunk_tokens = cap, chunk_tokens
        losses, log_sums = [], []
        with autocast_disabled(hidden):
            weight_for_product = weight.to(hidden.dtype)
            for chunk, target in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
                masked = target == MASKED
                logits = _logits(chunk, weight_for_product, masked, cap)
                log_sum = torch.logsumexp(logits, dim=1)
                target_logits = logits.gather(1, target.masked_fill(masked, 0)[:, None]).squeeze(1)
                losses.append((log_sum - target_logits).masked_fill_(masked, 0))
                log_sums.append(log_sum)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(log_sums))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
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
                index = target.masked_fill(masked, 0)[:, None]
                grad_logits.scatter_add_(1, index, grad_logits.new_full(index.shape, -1))
                if ctx.cap is not None:
                    # The derivative of cap * tanh(x / cap) is 1 - tanh^2, and the capped logits hold the tanh.
                    grad_logits.mul_(logits.div_(ctx.cap).square_().neg_().add_(1))
                grad_logits.mul_(grad_losses[tokens].masked_fill(masked, 0)[:, None])
                grad_product = grad_logits.to(hidden.dtype)
                if needs_hidden:
                    torch.mm(grad_product, weight_for_product, out=grad_hidden[tokens])
                if needs_weight:
                    grad_weight += grad_product.t() @ chunk.masked_fill(masked[:, None], 0)
        if needs_weight:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def _logits(hidden: Tensor, weight: Tensor, masked: Tensor, cap: float | None) -> Tensor:
    """Capped logits [tokens, V] in the precision of the loss; a masked token's hidden state counts as zero."""
    # Not even a NaN in a padded position may reach the gradient of the weight.
    logits = (hidden.masked_fill(masked[:, None], 0) @ weight.t()).to(compute_dtype(hidden))
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

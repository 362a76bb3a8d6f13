"""Cross-entropy straight from hidden states, without ever holding the logits of the whole batch.

Axes: B batch, S sequence, D model dimension, V vocabulary, N tokens (B * S).
"""

import torch
from torch import Tensor

from kernels import backend_choice
from kernels.cross_entropy import reference
from kernels.cross_entropy.reference import MASKED

__all__ = ["MASKED", "linear_cross_entropy", "linear_cross_entropy_sum"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    soft_cap: float | None = None,
    z_loss_weight: float = 0.0,
    chunk_tokens: int | None = None,
    backend: str = "auto",
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
        z_loss_weight: adds z_loss_weight * logsumexp(logits)^2 to every token's loss, with the logits behind the soft
            cap: keeps the softmax's normaliser near 1 (PaLM, arXiv 2204.02311, section 5, has 1e-4). 0: nothing.
        chunk_tokens: how many tokens' logits to hold at a time; None: what suits the backend.
        backend: one of kernels.backend_choice.BACKENDS; "auto" chooses.

    Returns:
        [B, S] float32 (float64 for float64 inputs), 0 where the target is -100.

    Raises:
        ValueError: the shapes do not fit, a setting is out of range, or the backend cannot do this.
        RuntimeError: a target is neither -100 nor in [0, V).
    """
    _check(hidden, weight, targets, soft_cap, z_loss_weight, chunk_tokens)
    tokens, flat_targets = hidden.flatten(0, -2), targets.flatten()
    if _chosen(backend, hidden, weight) == "reference":
        losses = reference.linear_cross_entropy(tokens, weight, flat_targets, soft_cap, z_loss_weight, chunk_tokens)
    else:
        from kernels.cross_entropy import fused

        settings = fused.LossSettings(soft_cap, z_loss_weight, chunk_tokens)
        losses = fused.linear_cross_entropy(tokens, weight, flat_targets, settings)
    return losses.view(targets.shape)


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    soft_cap: float | None = None,
    z_loss_weight: float = 0.0,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The sum of linear_cross_entropy over all tokens: what training wants, for three matrix products instead of four.

    The Triton backend makes the gradients while the logits are there, instead of computing those again in the backward
    pass, which then only multiplies by what comes from above. It keeps the gradients of hidden (in its dtype) and of
    weight (float32) between the passes.

    Args and errors: as linear_cross_entropy.

    Returns:
        0-d float32 (float64 for float64 inputs).
    """
    _check(hidden, weight, targets, soft_cap, z_loss_weight, chunk_tokens)
    tokens, flat_targets = hidden.flatten(0, -2), targets.flatten()
    if _chosen(backend, hidden, weight) == "reference":
        losses = reference.linear_cross_entropy(tokens, weight, flat_targets, soft_cap, z_loss_weight, chunk_tokens)
        return losses.sum()
    from kernels.cross_entropy import fused

    settings = fused.LossSettings(soft_cap, z_loss_weight, chunk_tokens)
    return fused.linear_cross_entropy_sum(tokens, weight, flat_targets, settings)


def _chosen(backend: str, hidden: Tensor, weight: Tensor) -> str:
    is_double = hidden.dtype == torch.float64 or weight.dtype == torch.float64
    reason = "the kernels compute in float32 and a tensor is float64" if is_double else None
    return backend_choice.choose("cross-entropy", backend, hidden, lambda: reason)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    soft_cap: float | None,
    z_loss_weight: float,
    chunk_tokens: int | None,
) -> None:
    if hidden.shape[:-1] != targets.shape or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            "linear_cross_entropy needs hidden [B, S, D], weight [V, D] and targets [B, S], got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"a soft cap must be positive, not {soft_cap}; use null for no cap")
    if not 0 <= z_loss_weight < float("inf"):
        raise ValueError(f"z_loss_weight must be 0 (no z-loss) or positive, not {z_loss_weight}")

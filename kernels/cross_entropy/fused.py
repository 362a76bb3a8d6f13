"""The loss for a GPU: cuBLAS products, a chunk of tokens at a time, and between them the Triton kernels of rows.py.

Gradients replace the logits of their chunk in place. `linear_cross_entropy` needs four products for each chunk (its
logits twice), `linear_cross_entropy_sum` three.

Axes: N tokens, D model dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.cross_entropy.reference import MASKED
from kernels.cross_entropy.rows import store_gradients, store_losses, store_losses_and_gradients
from kernels.operators import operator
from kernels.precision import autocast_disabled

# Enough rows for the products of a narrow model to fill a GPU; 0.4 GB of logits in bfloat16 at V = 50304.
CHUNK_TOKENS = 4096


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    valid = (targets == MASKED) | ((targets >= 0) & (targets < vocabulary))
    # On a GPU this does not wait: the device stops.
    torch._assert_async(valid.all(), f"a target is out of bounds for {vocabulary} token ids")


class _Chunks:
    """The products of one pass, chunk by chunk, in one buffer."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None):
        self.hidden, self.targets = hidden, targets
        self.weight = weight.to(hidden.dtype)
        # At least 1, where there is no token either.
        self.size = max(1, min(chunk_tokens or CHUNK_TOKENS, len(hidden)))
        # Rows that begin at a multiple of 16 elements keep wide loads and fast products for every vocabulary.
        padded = -(-weight.shape[0] // 16) * 16
        self.buffer = hidden.new_empty(self.size, padded)[:, : weight.shape[0]]
        # float32; None before the first token.
        self._grad_weight: Tensor | None = None

    def __iter__(self) -> Iterator[slice]:
        """The slices of the tokens; none is empty."""
        for start in range(0, len(self.hidden), self.size):
            yield slice(start, min(start + self.size, len(self.hidden)))

    def logits(self, tokens: slice) -> Tensor:
        """[chunk, V] before the cap, in hidden's dtype, in the buffer."""
        return torch.mm(self.hidden[tokens], self.weight.t(), out=self.buffer[: tokens.stop - tokens.start])

    def add_grad_weight(self, tokens: slice, grad_logits: Tensor) -> None:
        """Add a chunk's gradient of the weight in float32."""
        # Not even a NaN in a padded position may reach it.
        hidden = self.hidden[tokens].masked_fill((self.targets[tokens] == MASKED)[:, None], 0)
        kept = 0 if self._grad_weight is None else 1
        if self._grad_weight is None:
            self._grad_weight = torch.empty(self.weight.shape, dtype=torch.float32, device=hidden.device)
        total = self._grad_weight
        if hidden.dtype == torch.float32:
            total.addmm_(grad_logits.t(), hidden, beta=kept)
        elif hidden.is_cuda:
            torch.addmm(total, grad_logits.t(), hidden, beta=kept, out_dtype=torch.float32, out=total)
        else:
            # Under the interpreter: a CPU has no product of 16-bit matrices with a float32 result.
            total.addmm_(grad_logits.t().float(), hidden.float(), beta=kept)

    def grad_weight(self) -> Tensor:
        """The sum over the chunks [V, D], float32."""
        if self._grad_weight is None:
            return torch.zeros(self.weight.shape, dtype=torch.float32, device=self.weight.device)
        return self._grad_weight


class LossSettings(NamedTuple):
    """The soft cap of the logits, the weight of the z-loss, and tokens per chunk (None: CHUNK_TOKENS)."""

    cap: float | None
    z_loss_weight: float
    chunk_tokens: int | None


class Losses(NamedTuple):
    """Losses and log-sum-exps [N] float32."""

    losses: Tensor
    log_sums: Tensor


class Gradients(NamedTuple):
    """Gradients of hidden and weight; one that is not needed is empty."""

    hidden: Tensor
    weight: Tensor


@operator("linear_cross_entropy")
def losses_of_tokens(hidden: Tensor, weight: Tensor, targets: Tensor, settings: LossSettings) -> Losses:
    """For hidden [N, D], weight [V, D] and targets [N]."""
    cap, z_loss_weight, chunk_tokens = settings
    _check_targets(targets, weight.shape[0])
    losses, log_sums = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
    with autocast_disabled(hidden):
        chunks = _Chunks(hidden, weight, targets, chunk_tokens)
        for tokens in chunks:
            logits = chunks.logits(tokens)
            store_losses(logits, targets[tokens], losses[tokens], log_sums[tokens], cap, z_loss_weight)
    return Losses(losses, log_sums)


@losses_of_tokens.fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, settings: LossSettings) -> Losses:
    # Not len(hidden): that is a number, and would tie what torch.compile makes to it.
    return Losses(*(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(2)))


@operator("linear_cross_entropy_backward")
def gradients_of_losses(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sums: Tensor,
    settings: LossSettings,
    needs_hidden: bool,
    needs_weight: bool,
) -> Gradients:
    """From the gradients [N] of the losses."""
    cap, z_loss_weight, chunk_tokens = settings
    grad_hidden = hidden.new_empty(hidden.shape) if needs_hidden else hidden.new_empty(0)
    grad_losses = grad_losses.contiguous()
    with autocast_disabled(hidden):
        chunks = _Chunks(hidden, weight, targets, chunk_tokens)
        for tokens in chunks:
            logits = chunks.logits(tokens)
            store_gradients(logits, targets[tokens], log_sums[tokens], grad_losses[tokens], cap, z_loss_weight)
            if needs_hidden:
                torch.mm(logits, chunks.weight, out=grad_hidden[tokens])
            if needs_weight:
                chunks.add_grad_weight(tokens, logits)
    return Gradients(grad_hidden, chunks.grad_weight().to(weight.dtype) if needs_weight else weight.new_empty(0))


@gradients_of_losses.fake
def _(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sums: Tensor,
    settings: LossSettings,
    needs_hidden: bool,
    needs_weight: bool,
) -> Gradients:
    return Gradients(
        hidden.new_empty(hidden.shape if needs_hidden else 0), weight.new_empty(weight.shape if needs_weight else 0)
    )


def _keep(ctx: Any, arguments: list[Any], results: Losses) -> None:
    hidden, weight, targets, ctx.settings = arguments
    ctx.save_for_backward(hidden, weight, targets, results.log_sums)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grads: Losses) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    hidden, weight, targets, log_sums = ctx.saved_tensors
    gradients = gradients_of_losses(grads.losses, hidden, weight, targets, log_sums, ctx.settings, *needs)
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))


losses_of_tokens.differentiate(_keep, _differentiate)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, settings: LossSettings) -> Tensor:
    """As kernels.cross_entropy.linear_cross_entropy, for hidden [N, D] and targets [N] -> losses [N]."""
    return losses_of_tokens(hidden, weight, targets, settings).losses


class SumResults(NamedTuple):
    """The summed loss [] float32, its gradients of hidden (in hidden's dtype) and weight (float32); empty where not
    needed.
    """

    loss: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor


@operator("linear_cross_entropy_sum")
def summed_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, settings: LossSettings, needs_hidden: bool, needs_weight: bool
) -> SumResults:
    """Losses and gradients in one pass: for hidden [N, D], weight [V, D] and targets [N]."""
    cap, z_loss_weight, chunk_tokens = settings
    _check_targets(targets, weight.shape[0])
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    grad_hidden = hidden.new_empty(hidden.shape) if needs_hidden else hidden.new_empty(0)
    with autocast_disabled(hidden):
        chunks = _Chunks(hidden, weight, targets, chunk_tokens)
        for tokens in chunks:
            logits = chunks.logits(tokens)
            if not (needs_hidden or needs_weight):
                store_losses(
                    logits, targets[tokens], losses[tokens], torch.empty_like(losses[tokens]), cap, z_loss_weight
                )
                continue
            store_losses_and_gradients(logits, targets[tokens], losses[tokens], cap, z_loss_weight)
            if needs_hidden:
                torch.mm(logits, chunks.weight, out=grad_hidden[tokens])
            if needs_weight:
                chunks.add_grad_weight(tokens, logits)
    return SumResults(losses.sum(), grad_hidden, chunks.grad_weight() if needs_weight else losses.new_empty(0))


@summed_loss.fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, settings: LossSettings, needs_hidden: bool, needs_weight: bool
) -> SumResults:
    loss_sum = torch.empty((), dtype=torch.float32, device=hidden.device)
    grad_weight = loss_sum.new_empty(weight.shape if needs_weight else 0)
    return SumResults(loss_sum, hidden.new_empty(hidden.shape if needs_hidden else 0), grad_weight)


def _keep_gradients(ctx: Any, arguments: list[Any], results: SumResults) -> None:
    ctx.weight_dtype = arguments[1].dtype
    ctx.save_for_backward(results.grad_hidden, results.grad_weight)
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx: Any, grads: SumResults) -> tuple[Tensor | None, Tensor | None]:
    grad_sum = grads.loss
    grad_hidden, grad_weight = ctx.saved_tensors
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    # In float32: a factor such as 1 / (tokens of the batch), rounded to bfloat16, would be off by up to 0.4 %.
    scaled_hidden = (grad_hidden.float() * grad_sum).to(grad_hidden.dtype) if needs_hidden else None
    scaled_weight = (grad_weight * grad_sum).to(ctx.weight_dtype) if needs_weight else None
    return scaled_hidden, scaled_weight


summed_loss.differentiate(_keep_gradients, _scale_gradients)


def linear_cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, settings: LossSettings) -> Tensor:
    """As kernels.cross_entropy.linear_cross_entropy_sum, for hidden [N, D] and targets [N] -> the sum []."""
    needs_hidden, needs_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    return summed_loss(hidden, weight, targets, settings, needs_hidden, needs_weight).loss

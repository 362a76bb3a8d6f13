"""The loss for a GPU: cuBLAS products, a chunk of tokens at a time, and between them the Triton kernels of rows.py.

Gradients replace the logits of their chunk in place. `linear_cross_entropy` needs four products for each chunk (its
logits twice), `linear_cross_entropy_sum` three.

Axes: N tokens, D model dimension, V vocabulary.
"""

import torch
from torch import Tensor

from kernels.cross_entropy.reference import MASKED
from kernels.cross_entropy.rows import store_gradients, store_losses, store_losses_and_gradients
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
        self._grad_weight = None

    def __iter__(self):
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


@torch.library.custom_op("xlstm_pretrain::linear_cross_entropy", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None, z_loss_weight: float, chunk_tokens: int | None
) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps [N] float32."""
    _check_targets(targets, weight.shape[0])
    losses, log_sums = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
    with autocast_disabled(hidden):
        chunks = _Chunks(hidden, weight, targets, chunk_tokens)
        for tokens in chunks:
            logits = chunks.logits(tokens)
            store_losses(logits, targets[tokens], losses[tokens], log_sums[tokens], cap, z_loss_weight)
    return losses, log_sums


@_forward.register_fake
def _(hidden, weight, targets, cap, z_loss_weight, chunk_tokens):
    # Not len(hidden): that is a number, and would tie what torch.compile makes to it.
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("xlstm_pretrain::linear_cross_entropy_backward", mutates_args=())
def _backward(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sums: Tensor,
    cap: float | None,
    z_loss_weight: float,
    chunk_tokens: int | None,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight; one that is not needed is empty."""
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
    return grad_hidden, chunks.grad_weight().to(weight.dtype) if needs_weight else weight.new_empty(0)


@_backward.register_fake
def _(grad_losses, hidden, weight, targets, log_sums, cap, z_loss_weight, chunk_tokens, needs_hidden, needs_weight):
    return hidden.new_empty(hidden.shape if needs_hidden else 0), weight.new_empty(weight.shape if needs_weight else 0)


def _keep(ctx, inputs, output):
    hidden, weight, targets, *ctx.settings = inputs
    ctx.save_for_backward(hidden, weight, targets, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_losses, _):
    needs = ctx.needs_input_grad[:2]
    gradients = _backward(grad_losses, *ctx.saved_tensors, *ctx.settings, *needs)
    kept = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
    return *kept, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None, z_loss_weight: float, chunk_tokens: int | None
) -> Tensor:
    """As kernels.cross_entropy.linear_cross_entropy, for hidden [N, D] and targets [N] -> losses [N]."""
    return _forward(hidden, weight, targets, cap, z_loss_weight, chunk_tokens)[0]


@torch.library.custom_op("xlstm_pretrain::linear_cross_entropy_sum", mutates_args=())
def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cap: float | None,
    z_loss_weight: float,
    chunk_tokens: int | None,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, its gradients of hidden (in hidden's dtype) and weight (float32); empty where not needed."""
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
    return losses.sum(), grad_hidden, chunks.grad_weight() if needs_weight else losses.new_empty(0)


@linear_cross_entropy_sum.register_fake
def _(hidden, weight, targets, cap, z_loss_weight, chunk_tokens, needs_hidden, needs_weight):
    loss_sum = torch.empty((), dtype=torch.float32, device=hidden.device)
    grad_weight = loss_sum.new_empty(weight.shape if needs_weight else 0)
    return loss_sum, hidden.new_empty(hidden.shape if needs_hidden else 0), grad_weight


def _keep_gradients(ctx, inputs, output):
    ctx.weight_dtype = inputs[1].dtype
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx, grad_sum, *_):
    grad_hidden, grad_weight = ctx.saved_tensors
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    # In float32: a factor such as 1 / (tokens of the batch), rounded to bfloat16, would be off by up to 0.4 %.
    scaled_hidden = (grad_hidden.float() * grad_sum).to(grad_hidden.dtype) if needs_hidden else None
    scaled_weight = (grad_weight * grad_sum).to(ctx.weight_dtype) if needs_weight else None
    return scaled_hidden, scaled_weight, None, None, None, None, None, None


linear_cross_entropy_sum.register_autograd(_scale_gradients, setup_context=_keep_gradients)

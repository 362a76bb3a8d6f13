"""A micro-batch chunk by chunk in time: exact gradients in activation memory that does not grow with the length.

All chunks but the last run forward once without gradients, and only the state behind each is kept. Then, from the last
chunk to the first: the chunk runs again from the state that enters it, and backward, with the gradient of its loss and
with that of the state behind it, which the later chunk gave; the gradient of the state that enters it goes to the chunk
before. So each token costs at most one more forward pass. Of caches that grow with every token (attention) there is
always the longest one and its gradient. Source: the chain rule over the states between chunks, as in backpropagation
through time with checkpoints (arXiv 1606.03401).

On a GPU the states between chunks wait in the memory of the host.

Axes: B batch, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import statistics
from model.state import ModelState, map_tensors, named_tensors
from model.statistics import Statistics

# As train.parallel.token_loss.TokenLossSum: tokens, targets, document_start, state, return_state -> loss sum, state.
LossAndState = Callable[[Tensor, Tensor | None, Tensor, ModelState | None, bool], tuple[Any, Any]]


@dataclass(frozen=True)
class TimeChunks:
    """How sequences are cut. `length`: tokens of a chunk, fewer in the last one of a sequence; None: nothing is cut."""

    length: int | None = None

    def count(self, sequence_length: int) -> int:
        """Chunks of a sequence, each with one backward pass."""
        return 1 if self.length is None else -(-sequence_length // self.length)

    def ranges(self, sequence_length: int) -> list[slice]:
        """The places of each chunk, first to last."""
        length = self.length or sequence_length
        return [slice(begin, min(begin + length, sequence_length)) for begin in range(0, sequence_length, length)]

    def forward_backward(
        self,
        module: LossAndState,
        batch: tuple[Tensor, Tensor, Tensor],
        backward: Callable[[Tensor], None],
        loss_scale: Tensor,
        state: ModelState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, ModelState | None]:
        """Add the gradient of (sum of token losses) * loss_scale to that of the parameters.

        Args:
            module: what computes a stretch of tokens.
            batch: tokens, targets and document_start, each [B, S].
            backward: differentiates a scalar; called once for each chunk, with no other call of `module` between the
                chunk's forward pass and this.
            loss_scale: scalar.
            state: what enters the sequences; no gradient goes into it. None: nothing.
            return_state: also return what leaves them.

        Returns:
            the sum of the token losses, and the state behind the last token or None; both without a graph.
        """
        chunks = self.ranges(batch[0].shape[1])
        entering = _Entering(state)
        for chunk in chunks[:-1]:
            tokens, _, document_start = (tensor[:, chunk] for tensor in batch)
            with torch.no_grad(), statistics.paused():
                _, behind = module(tokens, None, document_start, entering.newest, True)
            entering.add(behind)
        loss = loss_scale.new_zeros(())
        leaving: ModelState | None = None
        gradients: list[Tensor | None] | None = None
        recorded: list[tuple[int, Statistics]] = []
        for index, before in zip(reversed(range(len(chunks))), entering.last_to_first(), strict=True):
            tokens, targets, document_start = (tensor[:, chunks[index]] for tensor in batch)
            leaves = [] if index == 0 else as_leaves(before)
            is_last = index == len(chunks) - 1
            with statistics.recording_chunk(is_first=index == 0) as measured:
                part, behind = module(tokens, targets, document_start, before, return_state or not is_last)
            if measured is not None:
                recorded.append((tokens.shape[1], measured))
            if is_last:
                leaving = behind.detach() if return_state else None
            loss += part.detach()
            scaled = part * loss_scale
            if gradients is not None:
                scaled = with_gradients(scaled, behind, partial(list, gradients))
            del part, behind
            backward(scaled)
            gradients = [leaf.grad for leaf in leaves]
        statistics.add_chunks(recorded[::-1])
        return loss, leaving

    def loss_sum(self, module: LossAndState, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The sum of the token losses of sequences that begin empty: a forward pass alone, chunk by chunk."""
        chunks = self.ranges(batch[0].shape[1])
        losses, state = [], None
        for chunk in chunks:
            tokens, targets, document_start = (tensor[:, chunk] for tensor in batch)
            loss, state = module(tokens, targets, document_start, state, chunk.stop < batch[0].shape[1])
            losses.append(loss)
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


class _Entering:
    """The states that enter the chunks, first to last. What grows with every token, a cache, is kept once: the earlier
    states have the first tokens of the last one's."""

    def __init__(self, first: ModelState | None):
        self.newest = first
        # Of all but the newest: the state with its tensors taken out, and these, or of a cache the tokens in it.
        self._kept: list[tuple[ModelState | None, list[Tensor | int]]] = []

    def add(self, state: ModelState) -> None:
        """The state that enters the next chunk."""
        kept: list[Tensor | int] = []
        if self.newest is not None:
            for tensor, later in zip(_tensors(self.newest), _tensors(state), strict=True):
                kept.append(_kept(tensor) if tensor.shape == later.shape else tensor.shape[1])
        self._kept.append((map_tensors(self.newest, lambda tensor: tensor.new_empty(0)), kept))
        self.newest = state

    def last_to_first(self) -> Iterator[ModelState | None]:
        """All of them, once."""
        newest, self.newest = self.newest, None
        longest = [tensor.detach() for tensor in _tensors(newest)]
        yield newest
        del newest
        while self._kept:
            form, kept = self._kept.pop()
            tensors = iter(
                [
                    last[:, :part] if isinstance(part, int) else part.to(last.device, non_blocking=True)
                    for part, last in zip(kept, longest, strict=False)
                ]
            )
            yield _filled(form, tensors)


def _kept(tensor: Tensor) -> Tensor:
    if tensor.is_cuda:
        # Page-locked, so that the copy waits for nothing and nothing for the copy.
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    # A view would keep what it is a view of.
    return tensor.clone()


def _filled(form: ModelState | None, tensors: Iterator[Tensor]) -> ModelState | None:
    return map_tensors(form, lambda _: next(tensors))


def _tensors(state: ModelState | None) -> list[Tensor]:
    return [tensor for _, tensor in named_tensors(state)]


def as_leaves(state: ModelState | None) -> list[Tensor]:
    """The tensors of a state without a graph, which are to get gradients where they can."""
    leaves = _tensors(state)
    for tensor in leaves:
        tensor.requires_grad_(tensor.is_floating_point())
    return leaves


def with_gradients(result: Tensor, state: ModelState, gradients: Callable[[], Sequence[Tensor | None]]) -> Tensor:
    """`result`, to which the tensors of a state are tied: they go backward when it does.

    `gradients`: gives theirs, which were found later in time, in the order of model.state.named_tensors; called in the
    backward pass. Whatever the engine has multiplied its losses by, they have been multiplied by already.
    """
    tied: Tensor = _WithGradients.apply(result, gradients, *_tensors(state))
    return tied


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, gradients: Callable[[], Sequence[Tensor | None]], *state: Tensor) -> Tensor:
        ctx.gradients = gradients
        return result.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None, *ctx.gradients()

"""Ranks that share a sequence as threads of one process: one graph of gradients, exchanges through shared memory.

It takes the place of process groups in tests of the layers. Axes as in model/sequence.py.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.mlstm import merge_weights
from model.sequence import ScaledSums, last_inputs
from model.state import map_tensors
from tests.runs import PATIENCE


class Exchange:
    """The shared memory of the ranks of one sequence."""

    def __init__(self, size: int):
        self.size = size
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.rounds = 0

    def gather(self, rank: int, value: Any) -> list[Any]:
        """What every rank gave in this round."""
        self.slots[rank] = value
        self.barrier.wait()
        values = list(self.slots)
        if rank == 0:
            self.rounds += 1
        self.barrier.wait()
        return values


class VirtualRank:
    """One of them: a model.sequence.SequenceContext."""

    def __init__(self, exchange: Exchange, rank: int):
        self.exchange = exchange
        self.rank = rank
        self.size = exchange.size
        # Of a function that is recomputed: whether it runs again, and what it received.
        self.again = False
        self.received: list[Any] | None = None

    def exchanged(self, function: Callable[[], Any]) -> Any:
        """What `function` gives, which exchanges with the others; the second time what it gave the first time."""
        if self.again:
            assert self.received is not None
            return self.received.pop(0)
        # Nothing of the exchange itself is computed again.
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            value = function()
        if self.received is not None:
            self.received.append(map_tensors(value, _cut))
        return value

    def incoming(self, summarise: Callable[[], Any], before: Any) -> Any:
        return _Entering(self, summarise(), before)

    def outgoing(self, state: Any) -> Any:
        return self.exchanged(lambda: self.exchange.gather(self.rank, state)[-1])

    def halo(self, x: Tensor, tokens: int, document_start: Tensor | None, before: Tensor | None) -> Tensor | None:
        own = last_inputs(x, tokens, document_start)
        return self.exchanged(lambda: [before, *self.exchange.gather(self.rank, own)][self.rank])

    def whole_time(self, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return self.exchanged(lambda: torch.cat(self.exchange.gather(self.rank, x), dim=1))

    def time_to_heads(self, x: Tensor) -> Tensor:
        return self.exchanged(lambda: torch.cat([self._heads(p) for p in self.exchange.gather(self.rank, x)], dim=1))

    def _heads(self, x: Tensor) -> Tensor:
        heads = x.shape[2]
        if heads < self.size:
            return x[:, :, self.rank * heads // self.size][:, :, None]
        return x.chunk(self.size, dim=2)[self.rank]

    def heads_to_time(self, x: Tensor) -> Tensor:
        def own_tokens() -> Tensor:
            parts = self.exchange.gather(self.rank, x)
            return torch.cat([part.chunk(self.size, dim=1)[self.rank] for part in parts], dim=2)

        return self.exchanged(own_tokens)

    def own_heads(self, x: Tensor, axis: int = 0) -> Tensor:
        return x.chunk(self.size, dim=axis)[self.rank]

    def recomputation(self) -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        received: list[Any] = []

        @contextlib.contextmanager
        def run(again: bool) -> Iterator[None]:
            before = self.again, self.received
            self.again, self.received = again, list(received) if again else received
            try:
                yield
            finally:
                self.again, self.received = before

        return run(False), run(True)


class _Entering:
    """Sums up what the earlier slices do, when it is asked. All ranks are in one graph of gradients."""

    border = None

    def __init__(self, rank: VirtualRank, summary: Any, before: Any):
        self.rank, self.summary, self.before = rank, summary, before

    def state(self) -> Any:
        return self.rank.exchanged(self._exchange)

    def _exchange(self) -> Any:
        sums = sums_before(self.summary, self.before)
        for earlier in self.rank.exchange.gather(self.rank.rank, self.summary)[: self.rank.rank]:
            sums = merged(sums, earlier.log_kept, earlier.added)
        return self.summary.form.state_of(sums)


def sums_before(summary: Any, state: Any) -> ScaledSums:
    """The sums in the state before a slice; None: the empty state."""
    if state is None:
        return ScaledSums(torch.zeros_like(summary.added.values), torch.zeros_like(summary.added.log_scale))
    sums: ScaledSums = summary.form.sums_of(state)
    return sums


def merged(first: ScaledSums, log_kept: Tensor, second: ScaledSums) -> ScaledSums:
    """The sums behind a slice that adds `second` and keeps a share of `first`."""
    log_scale, kept, added = merge_weights(first.log_scale, log_kept, second.log_scale)
    return ScaledSums(kept[..., None] * first.values + added[..., None] * second.values, log_scale)


def _cut(tensor: Tensor) -> Tensor:
    """The value alone, which needs a gradient where the tensor did: the same tensors are kept the second time."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def run_ranks(size: int, function: Callable[[VirtualRank], Any]) -> tuple[list[Any], Exchange]:
    """What `function` returns on each of `size` ranks."""
    exchange = Exchange(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(VirtualRank(exchange, rank))
        except BaseException as error:
            errors.append(error)
            exchange.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results, exchange

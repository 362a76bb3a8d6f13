"""The ranks of a mesh that share sequences, as layers see them: a model.sequence.SequenceContext over process groups.

What goes forward in one direction comes back as gradients in the other, by the same kind of exchange:

    sums that enter a slice     scan over the ranks        scan over the ranks, backwards
    inputs of a convolution     from the rank before       from the rank behind, added
    all heads of some tokens    all-to-all                 all-to-all
    the state at the end        from the last rank         summed on the last rank

Axes: B batch, S tokens of the whole sequence, P ranks, NH heads, C channels, E numbers that decay together, R = B NH.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.compilation import COMPILED, compiled, is_for_this_pass
from model.sequence import Border, Entering, ScaledSums, SliceSummary, StateForm, last_inputs
from model.state import map_tensors
from train.parallel.mesh import Mesh, Wait
from train.parallel.state_exchange import AUTO, Choice, Line, Links, Scan, choose, merge, message_of, parts_of

State = TypeVar("State")
Tree = TypeVar("Tree")

logger = logging.getLogger(__name__)

# Collectives and Python objects that live on until the backward pass: no graph of torch.compile can hold them.
_BETWEEN_GRAPHS = ("incoming", "apart", "outgoing", "halo", "whole_time", "time_to_heads", "heads_to_time")


class DistributedSequence:
    """This rank among the `sequence` ranks of a mesh. All of its methods are called by all of them, in one order.

    `exchange`: one of train.parallel.state_exchange.EXCHANGES, or "auto". `compiles`: whether blocks are compiled; what
    exchanges is then called between the graphs of a block.
    """

    def __init__(self, mesh: Mesh, exchange: str = AUTO, compiles: bool = False):
        self.mesh = mesh
        self.rank = mesh.place_in("sequence")
        self.size = mesh.size_of("sequence")
        hosts = len(set(mesh.gather_objects(socket.gethostname(), group="sequence")))
        self._links = Links(self.size, hosts)
        self._exchange = exchange
        self._choices: dict[int, Choice] = {}
        self._stream = torch.cuda.Stream(mesh.device) if mesh.device.type == "cuda" else None
        # While a function runs whose activations are recomputed: what it received, for its second run; and in that
        # run what is left to give again.
        self._kept: list[Any] | None = None
        self._given_again: list[Any] | None = None
        self._compiles = compiles
        if compiles:
            for name in _BETWEEN_GRAPHS:
                setattr(self, name, torch.compiler.disable(getattr(self, name)))

    def incoming(self, summarise: Callable[[], SliceSummary[State]], before: State | None) -> Entering[State]:
        """See SequenceContext. The exchange is under way when this returns."""
        if self._given_again is not None:
            return _EnteredBefore(self._next_given())
        computed = _compiled if self._compiles and is_for_this_pass() else _as_written
        with torch.no_grad():
            passage = _Passage(self, computed, summarise, before)
        if self._kept is not None:
            self._kept.append(passage)
        return passage

    def apart(self, function: Callable[..., Tree], *arguments: Any) -> Tree:
        """See SequenceContext."""
        return function(*arguments)

    def outgoing(self, state: State) -> State:
        """See SequenceContext."""
        return self._once(lambda: map_tensors(state, lambda tensor: _FromLast.apply(self.mesh, tensor)))

    def halo(self, x: Tensor, tokens: int, document_start: Tensor | None, before: Tensor | None) -> Tensor | None:
        """See SequenceContext. Raises ValueError where the halo is longer than a slice."""
        if x.shape[1] < tokens:
            raise ValueError(
                f"a convolution over {tokens + 1} tokens looks {tokens} tokens back, and a slice of the sequence has "
                f"{x.shape[1]}; raise training.sequence_length, or lower parallel.sequence={self.size}"
            )

        def exchanged() -> Tensor:
            halo: Tensor = _FromTheRankBefore.apply(Line(self.mesh), last_inputs(x, tokens, document_start), before)
            return halo

        return self._once(exchanged)

    def whole_time(self, x: Tensor | None) -> Tensor | None:
        """See SequenceContext."""
        if x is None:
            return None
        given = x.detach()

        def gathered() -> Tensor:
            # Not every backend has bool.
            sent = given.view(torch.uint8) if given.dtype == torch.bool else given
            slices, wait = self.mesh.start_gather(sent, group="sequence")
            wait()
            return torch.cat(slices.view(given.dtype).unbind(0), dim=1)

        return self._once(gathered)

    def time_to_heads(self, x: Tensor) -> Tensor:
        """See SequenceContext."""
        return self._once(lambda: _TimeToHeads.apply(self.mesh, x))

    def heads_to_time(self, x: Tensor) -> Tensor:
        """See SequenceContext."""
        return self._once(lambda: _HeadsToTime.apply(self.mesh, x))

    def own_heads(self, x: Tensor, axis: int = 0) -> Tensor:
        """See SequenceContext."""
        return x.chunk(self.size, dim=axis)[self.rank]

    def recomputation(self) -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        """See SequenceContext. What was received lives as long as the contexts, with the graph of the function."""
        received: list[Any] = []
        return self._first_run(received), self._second_run(received)

    @contextlib.contextmanager
    def _first_run(self, received: list[Any]) -> Iterator[None]:
        before, self._kept = self._kept, received
        try:
            yield
        finally:
            self._kept = before

    @contextlib.contextmanager
    def _second_run(self, received: list[Any]) -> Iterator[None]:
        before, self._given_again = self._given_again, list(received)
        try:
            yield
        finally:
            self._given_again = before

    def _once(self, exchange: Callable[[], Tree]) -> Tree:
        """What `exchange` gives, or in the second run of a function what it gave in the first."""
        if self._given_again is not None:
            given: Tree = self._next_given()
            return given
        with _kept_for_backward():
            result = exchange()
        if self._kept is not None:
            self._kept.append(map_tensors(result, _cut))
        return result

    def _next_given(self) -> Any:
        assert self._given_again is not None
        return self._given_again.pop(0)

    def choice(self, message_bytes: int) -> Choice:
        """How messages of this size are scanned. The first rank says so once."""
        if message_bytes not in self._choices:
            self._choices[message_bytes] = choose(self._exchange, self._links, message_bytes)
            if self.mesh.is_main:
                logger.info("sequence parallelism: %s", self._choices[message_bytes].reason)
        return self._choices[message_bytes]

    def start_scan(self, message: Tensor, backwards: bool = False) -> _RunningScan:
        """Begin to find the merged messages [R, E + 2] of the earlier ranks, or of the later ones."""
        exchange = self.choice(message.numel() * message.element_size()).exchange
        return _RunningScan(exchange.scan(Line(self.mesh, backwards), message), message, self._stream)


def _kept_for_backward() -> contextlib.AbstractContextManager[Any]:
    """Inside, what the backward pass needs is kept as it is, also where all else is recomputed."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _cut(tensor: Tensor) -> Tensor:
    """The value alone, which needs a gradient where the tensor did: the same tensors are kept the second time."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


class _RunningScan:
    """A scan under way: on a GPU all of it in a stream of its own, on a CPU up to the first wait.

    Memory goes from stream to stream without `record_stream`, for which the GPU is asked at every allocation. The
    message lives until the stream that it was made in has waited for the scan. A result may be freed at any time: what
    takes its place is made in a later scan, whose stream first waits for all that was asked for before it.
    """

    def __init__(self, scan: Scan, message: Tensor, stream: torch.cuda.Stream | None):
        self._scan = scan
        self._message: Tensor | None = message
        self._stream = stream
        self._result: Tensor | None = None
        self._wait: Wait | None = None
        if stream is None:
            self._advance()
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            self._advance()
            self._finish()
        self._done = stream.record_event()

    def _advance(self) -> None:
        """Go on to what has to be waited for next."""
        try:
            self._wait = next(self._scan)
        except StopIteration as stop:
            self._wait, self._result = None, stop.value

    def _finish(self) -> None:
        while self._wait is not None:
            self._wait()
            self._advance()

    def result(self) -> Tensor | None:
        """Wait for it: what `StateExchange.scan` returns."""
        if self._stream is None:
            self._finish()
        else:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_event(self._done)
        self._message = None
        return self._result


class _Passage(Generic[State]):
    """One exchange of states and, in the backward pass, of their gradients: an Entering and its Border.

    With the true sums S that enter a slice, those that it adds A and the share e^G that it keeps, S' = e^G S + A enters
    the next one. For the gradients X of S, which come from behind, and U of S by this rank's own outputs:

        X = U + e^G X'

    so that the gradients are sums that decay as S does, in the other direction, and the same scan finds X'. As S is
    stored divided by e^m, the gradient of what is stored is X e^m: the scale of the gradients as sums is -m.
    """

    def __init__(
        self,
        sequence: DistributedSequence,
        computed: Callable[[Callable[..., Any]], Callable[..., Any]],
        summarise: Callable[[], SliceSummary[State]],
        before: State | None,
    ):
        self._sequence, self._computed = sequence, computed
        self._form, self._before, added, self._log_kept = computed(_messages)(summarise, before)
        self._shape = self._log_kept.shape
        self._scan: _RunningScan | None = sequence.start_scan(added)
        self._entered: State | None = None

    @property
    def border(self) -> Border[State]:
        return self

    @property
    def is_first(self) -> bool:
        return self._sequence.rank == 0

    @torch.no_grad()
    def state(self) -> State:
        """See Entering."""
        if self._entered is None:
            assert self._scan is not None and self._before is not None
            earlier = self._scan.result()
            self._entered = self._computed(_entered)(self._form, self._shape, self._before, earlier)
            self._scan = self._before = None
        return self._entered

    def start_back(self, gradient: State) -> None:
        """See Border."""
        message = self._computed(_message)(self._form, gradient, self._log_kept)
        self._scan = self._sequence.start_scan(message, backwards=True)

    def leaving_gradient(self) -> State | None:
        """See Border."""
        assert self._scan is not None
        later = self._scan.result()
        self._scan = None
        return None if later is None else self._computed(_state_in)(self._form, self._shape, later)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled(function, COMPILED)


def _as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _messages(
    summarise: Callable[[], SliceSummary[State]], before: State | None
) -> tuple[StateForm[State], Tensor, Tensor, Tensor]:
    """The form of the states; the messages of what is before the sequence and of this slice; the slice's log_kept."""
    summary = summarise()
    added = summary.added
    own = message_of(added.values.flatten(0, 1), added.log_scale.flatten(), summary.log_kept.flatten())
    of_before = torch.zeros_like(own) if before is None else _message(summary.form, before, summary.log_kept)
    return summary.form, of_before, own, summary.log_kept


def _message(form: StateForm[State], state: State, log_kept: Tensor) -> Tensor:
    sums = form.sums_of(state)
    return message_of(sums.values.flatten(0, 1), sums.log_scale.flatten(), log_kept.flatten())


def _state_in(form: StateForm[State], shape: torch.Size, message: Tensor) -> State:
    values, log_scale, _ = parts_of(message)
    return form.state_of(ScaledSums(values.unflatten(0, shape), log_scale.reshape(shape)))


def _entered(form: StateForm[State], shape: torch.Size, before: Tensor, earlier: Tensor | None) -> State:
    return _state_in(form, shape, before if earlier is None else merge(before, earlier))


class _EnteredBefore(Generic[State]):
    """In the second run of a function: what entered in the first, whose border takes the gradients."""

    def __init__(self, first: _Passage[State]):
        self.border: Border[State] = first
        self.state = first.state


class _FromLast(torch.autograd.Function):
    """The tensor of the last rank; its gradient is the sum of everybody's."""

    @staticmethod
    def forward(ctx: Any, mesh: Mesh, tensor: Tensor) -> Tensor:
        ctx.mesh = mesh
        return mesh.broadcast(tensor.clone(memory_format=torch.contiguous_format), _last(mesh), group="sequence")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        mesh = ctx.mesh
        total = mesh.sum(gradient.clone(memory_format=torch.contiguous_format), group="sequence")
        return None, total if mesh.place_in("sequence") == _last(mesh) else torch.zeros_like(total)


def _last(mesh: Mesh) -> int:
    return mesh.size_of("sequence") - 1


class _FromTheRankBefore(torch.autograd.Function):
    """[B, tokens, C] of the rank before; on the first one `before`, or zeros."""

    @staticmethod
    def forward(ctx: Any, line: Line, own: Tensor, before: Tensor | None) -> Tensor:
        ctx.mesh, ctx.has_before = line.mesh, before is not None
        if line.place > 0:
            halo = torch.empty_like(own, memory_format=torch.contiguous_format)
        else:
            halo = torch.zeros_like(own) if before is None else before.to(own.dtype, copy=True)
        _pass_on(line, own, halo)
        return halo

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor | None]:
        line = Line(ctx.mesh, backwards=True)
        of_own = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        if line.place == 0:
            of_own.zero_()
        _pass_on(line, gradient, of_own)
        if not ctx.has_before:
            return None, of_own, None
        # As with the sums: what all ranks are given has its gradient on the first one.
        is_first = line.place == line.size - 1
        return None, of_own, gradient if is_first else torch.zeros_like(gradient)


def _pass_on(line: Line, own: Tensor, received: Tensor) -> None:
    """`own` to the next rank of the line, if there is one; into `received` from the one before, if there is one."""
    sent = own.contiguous() if line.place < line.size - 1 else None
    line.pass_on(sent, received if line.place > 0 else None)()


class _TimeToHeads(torch.autograd.Function):
    """[B, S / P, NH, ...] -> [B, S, NH / P, ...]; one head each, with others, where there are fewer than ranks."""

    @staticmethod
    def forward(ctx: Any, mesh: Mesh, x: Tensor) -> Tensor:
        ctx.mesh, ctx.heads = mesh, x.shape[2]
        return _as_time(mesh.all_to_all(_heads_by_rank(x, mesh.size_of("sequence")), group="sequence"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        mesh, size = ctx.mesh, ctx.mesh.size_of("sequence")
        parts = mesh.all_to_all(_time_by_rank(gradient, size), group="sequence")
        if ctx.heads < size:
            # Of each head from all that share it.
            parts = parts.unflatten(0, (ctx.heads, size // ctx.heads)).sum(1)
        return None, _as_heads(parts)


class _HeadsToTime(torch.autograd.Function):
    """[B, S, NH / P, ...] -> [B, S / P, NH, ...]."""

    @staticmethod
    def forward(ctx: Any, mesh: Mesh, x: Tensor) -> Tensor:
        ctx.mesh = mesh
        return _as_heads(mesh.all_to_all(_time_by_rank(x, mesh.size_of("sequence")), group="sequence"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        parts = _heads_by_rank(gradient, ctx.mesh.size_of("sequence"))
        return None, _as_time(ctx.mesh.all_to_all(parts, group="sequence"))


def _heads_by_rank(x: Tensor, size: int) -> Tensor:
    """[B, S / P, NH, ...] -> [P, B, S / P, heads of each, ...]."""
    heads = x.shape[2]
    assert heads % size == 0 or size % heads == 0, f"{heads} heads do not divide among {size} sequence ranks"
    if heads < size:
        return x.movedim(2, 0).repeat_interleave(size // heads, 0)[:, :, :, None]
    return torch.stack(x.chunk(size, dim=2))


def _time_by_rank(x: Tensor, size: int) -> Tensor:
    """[B, S, h, ...] -> [P, B, S / P, h, ...]."""
    return torch.stack(x.chunk(size, dim=1))


def _as_time(parts: Tensor) -> Tensor:
    """[P, B, S / P, h, ...], by slices -> [B, S, h, ...]."""
    return parts.movedim(0, 1).flatten(1, 2)


def _as_heads(parts: Tensor) -> Tensor:
    """[P, B, S / P, h, ...], by heads -> [B, S / P, P h, ...]."""
    return parts.movedim(0, 2).flatten(2, 3)

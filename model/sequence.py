"""How layers see a sequence that several ranks share: the protocol, and its default where one process has it all.

A sequence of S tokens lies in `size` slices of equal length, in the order of the ranks. A layer is given its slice, and
asks its `SequenceContext` for what crosses the borders. There are two ways, and a kind of layer takes one of them:

- By slices (mLSTM, convolutions): each rank computes its own tokens, from the state that enters its slice. The state
  given to the layer is the one before the whole sequence; the one that it returns is behind the whole sequence. Both
  are alike on every rank.
- By heads (sLSTM, attention): an exchange gives each rank some heads of all tokens, and another one gives its tokens
  back. The states given and returned are those of the rank's own heads.

Every method that moves tensors is differentiable, is called by all ranks in the same order, and keeps in the graph of
gradients what it was given, also where this rank has no use for the result: else others would wait for ever.

Axes: B batch, S tokens of the whole sequence, P ranks (`size`), NH heads, C channels, E numbers that decay together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

State = TypeVar("State")
Result = TypeVar("Result")


@dataclass
class ScaledSums:
    """What a layer carries from slice to slice: sums that decay, kept as numbers that cannot overflow.

    Attributes:
        values: [B, NH, E], float32 (float64 for float64 inputs). The sums are exp(log_scale) times these.
        log_scale: [B, NH], same dtype. It never carries a gradient: whoever reads the sums undoes the scale.
    """

    values: Tensor
    log_scale: Tensor


class StateForm(Protocol[State]):
    """How the state of a layer is sums that decay. Gradients of states are states too: they decay the other way."""

    def sums_of(self, state: State) -> ScaledSums:
        """The sums in a state."""
        ...

    def state_of(self, sums: ScaledSums) -> State:
        """The state with these sums."""
        ...


@dataclass
class SliceSummary(Generic[State]):
    """What a slice does to the state that enters it: it keeps a share of the state's sums, and adds its own.

    Summaries of neighbouring slices merge associatively (kernels.mlstm.merge_weights), so that ranks can scan them.

    Attributes:
        form: of the layer's states.
        added: what the slice's own tokens leave.
        log_kept: [B, NH]: the logarithm of the share of the sums before that survives; -inf: none.
    """

    form: StateForm[State]
    added: ScaledSums
    log_kept: Tensor


class Border(Protocol[State]):
    """What connects a slice with those of other ranks in the backward pass: kernels.mlstm.border says how.

    The gradients of a state are given as a state: those of its true sums, with a scale of their own.
    """

    @property
    def is_first(self) -> bool:
        """Whether no slice is before this one."""
        ...

    def start_back(self, gradient: State) -> None:
        """Begin to send the gradient of the state that entered, by this slice's own results, to the earlier slices."""
        ...

    def leaving_gradient(self) -> State | None:
        """Wait for the gradient of the state that leaves, by all later slices; None behind the last one."""
        ...


class Entering(Protocol[State]):
    """The state that enters a slice, perhaps still on its way."""

    @property
    def border(self) -> Border[State] | None:
        """What takes gradients of the state to other ranks; None: the state has its own graph of gradients."""
        ...

    def state(self) -> State | None:
        """Wait for it. None: the empty state, where there is no border."""
        ...


class SequenceContext(Protocol):
    """This rank among those that share a sequence."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def incoming(self, summarise: Callable[[], SliceSummary[State]], before: State | None) -> Entering[State]:
        """Begin to exchange what the slices do to a state.

        Args:
            summarise: gives the summary of this rank's slice; called only if there are other ranks.
            before: the state before the whole sequence; None: the empty state.

        Returns:
            what enters this slice. Ask for it late: what is computed until then hides the exchange. The layer hands
            on gradients by its border, if it has one.
        """
        ...

    def apart(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What `function` gives for `arguments`, where it waits for other ranks: compiled blocks do not contain it."""
        ...

    def outgoing(self, state: State) -> State:
        """The state behind the whole sequence (that of the last rank), from the one behind this rank's slice.

        `state` is a tree of dataclasses with tensors at its leaves (model.state.map_tensors).
        """
        ...

    def halo(self, x: Tensor, tokens: int, document_start: Tensor | None, before: Tensor | None) -> Tensor | None:
        """The `tokens` inputs before this slice, for a convolution: [B, tokens, C]; None: zeros.

        Args:
            x: [B, S / P, C], this slice's inputs; S / P is at least `tokens`.
            document_start: [B, S / P] bool. Inputs of a document that ends within them are zeros (`last_inputs`).
            before: the inputs before the whole sequence.
        """
        ...

    def whole_time(self, x: Tensor | None) -> Tensor | None:
        """All slices one behind the other, [B, S / P, ...] -> [B, S, ...], without gradient; None stays None."""
        ...

    def time_to_heads(self, x: Tensor) -> Tensor:
        """Some heads of all tokens for all heads of some: [B, S / P, NH, ...] -> [B, S, NH / P, ...].

        Rank r gets heads r NH / P to (r + 1) NH / P - 1; where NH is smaller than P and divides it, head r NH / P
        (rounded down), which it then shares with others.
        """
        ...

    def heads_to_time(self, x: Tensor) -> Tensor:
        """The way back: [B, S, NH / P, ...] -> [B, S / P, NH, ...]."""
        ...

    def own_heads(self, x: Tensor, axis: int = 0) -> Tensor:
        """The share of a parameter that belongs to this rank's heads: the `rank`-th of P equal pieces of `axis`."""
        ...

    def recomputation(self) -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        """Around the first and the second run of a function whose activations are recomputed.

        In the second run nothing is exchanged: what the first run received is given again.
        """
        ...


class Arrived:
    """A state that is there already, with its graph of gradients."""

    border = None

    def __init__(self, state: Any):
        self._state = state

    def state(self) -> Any:
        return self._state


class LocalSequence:
    """One rank has the whole sequence: nothing is exchanged and nothing is copied."""

    rank = 0
    size = 1

    def incoming(self, summarise: Callable[[], SliceSummary[State]], before: State | None) -> Entering[State]:
        return Arrived(before)

    def apart(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return function(*arguments)

    def outgoing(self, state: State) -> State:
        return state

    def halo(self, x: Tensor, tokens: int, document_start: Tensor | None, before: Tensor | None) -> Tensor | None:
        return before

    def whole_time(self, x: Tensor | None) -> Tensor | None:
        return x

    def time_to_heads(self, x: Tensor) -> Tensor:
        return x

    def heads_to_time(self, x: Tensor) -> Tensor:
        return x

    def own_heads(self, x: Tensor, axis: int = 0) -> Tensor:
        return x

    def recomputation(self) -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        return contextlib.nullcontext(), contextlib.nullcontext()


LOCAL: SequenceContext = LocalSequence()


def last_inputs(x: Tensor, tokens: int, document_start: Tensor | None) -> Tensor:
    """The last inputs of a slice, as a convolution in the next one may see them.

    x [B, S, C], document_start [B, S] bool or None -> [B, tokens, C], zeros in place of those of a document that is no
    longer open behind the slice.
    """
    assert x.shape[1] >= tokens, f"a slice of {x.shape[1]} tokens is shorter than the {tokens} that the next one sees"
    last = x[:, x.shape[1] - tokens :]
    if document_start is None:
        return last
    document = document_start.cumsum(1)
    open_document = document[:, x.shape[1] - tokens :] == document[:, -1:]
    return last.masked_fill(~open_document[..., None], 0)

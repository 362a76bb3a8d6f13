"""What the layers report about their numerical health while a recording is on.

Layers call `record`; without a recording that is one comparison. Values stay on the device as 0-d tensors: nothing here
waits for the GPU. Names, of layer 3 for example:

    blocks.03.mixer_norm.input_rms, .output_rms      the same for blocks.03.ffn_norm and for out_norm
    blocks.03.mixer.igate_preact_min, _max, _mean    after the soft cap; the same for fgate
    blocks.03.mixer.igate_soft_cap_saturation        share of pre-activations beyond 0.8 of the cap; the same for fgate
    blocks.03.mixer.stabiliser_min, _max             the running maximum m of the cell, on its first 256 tokens (of a
                                                     sequence that ranks share or that goes in time chunks: those of
                                                     the first slice or chunk)
    blocks.03.mixer.normaliser_floor_fraction        share of tokens where |n q| <= exp(-m); mLSTM only
    blocks.03.output_rms                             of the residual stream behind the block
    logits.max, logits.soft_cap_saturation           on the first 64 tokens of the first sequence

Profiles have a number for each head, bin or position. What was not measured here (heads that other ranks compute,
positions behind a document's end) is not a number, and left out of means:

    blocks.03.mixer.forget_rate [NH]                 mean of -log sigmoid(f) over tokens, in nats per token; of an sLSTM
                                                     that of the unit of each head that forgets least
    blocks.03.mixer.igate_histogram [bins]           share of the pre-activations in each of HISTOGRAM_EDGES' bins,
                                                     after the soft cap; the same for fgate
    blocks.03.mixer.state_log_norm [positions]       ln of the Frobenius norm of the memory C behind so many tokens
                                                     (STATE_POSITIONS) of a document that begins the first sequence,
                                                     mean over heads; mLSTM only
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.precision import compute_dtype

# "rms" is the mean of root mean squares; of ranks that hold slices of a sequence, of those of the whole sequence.
REDUCTIONS = ("mean", "rms", "min", "max")
SATURATED_SHARE_OF_CAP = 0.8
# Inner edges of the bins of gate pre-activations. A forget gate is 0.12 at -2 and 0.88 at 2; both outer bins are open.
_EDGES = range(-14, 15, 2)
HISTOGRAM_EDGES = tuple(map(float, _EDGES))
# Tokens behind which the norm of a state is measured.
STATE_POSITIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Statistics:
    """Values recorded so far; a name that is recorded again (micro-batches) is combined by its reduction."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[str, list[Tensor]]] = {}
        self._profiles: dict[str, list[Tensor]] = {}

    def add(self, name: str, reduction: str, value: Tensor) -> None:
        """Combine the 0-d tensor `value` into `name` by `reduction`, one of REDUCTIONS."""
        assert reduction in REDUCTIONS and value.dim() == 0, (name, reduction, value.shape)
        value = value.detach().float()
        if name not in self._values:
            self._values[name] = (reduction, [value])
            return
        _, values = self._values[name]
        if reduction in ("min", "max"):
            values[0] = (torch.minimum if reduction == "min" else torch.maximum)(values[0], value)
        else:
            values.append(value)

    def add_profile(self, name: str, values: Tensor) -> None:
        """Average the 1-d tensor `values` into the profile `name`, element by element."""
        assert values.dim() == 1, (name, values.shape)
        self._profiles.setdefault(name, []).append(values.detach().float())

    def profiles(self) -> dict[str, Tensor]:
        """name -> means of what was recorded, 1-d float32 on the layer's device; not a number where nothing was."""
        return {name: torch.stack(values).nanmean(0) for name, values in self._profiles.items()}

    def add_chunks(self, chunks: Sequence[tuple[int, Statistics]]) -> None:
        """Add what was recorded in the time chunks of the same sequences, as one pass over all of them would have it.

        chunks: (tokens, what its one pass recorded) of each. A mean is that of all tokens; what the first chunk alone
        measures is as it found it.
        """
        of_names: dict[str, tuple[str, list[tuple[int, Tensor]]]] = {}
        for tokens, chunk in chunks:
            for name, (reduction, values) in chunk._values.items():
                value = functools.reduce(Tensor.add, values) / len(values)
                of_names.setdefault(name, (reduction, []))[1].append((tokens, value))
        for name, (reduction, parts) in of_names.items():
            if len(parts) == 1:
                self.add(name, reduction, parts[0][1])
                continue
            of_chunks = torch.stack([value for _, value in parts])
            weights = of_chunks.new_tensor([tokens for tokens, _ in parts])
            weights /= weights.sum()
            if reduction in ("min", "max"):
                self.add(name, reduction, of_chunks.min() if reduction == "min" else of_chunks.max())
            elif reduction == "rms":
                self.add(name, reduction, (of_chunks.square() * weights).sum().sqrt())
            else:
                self.add(name, reduction, (of_chunks * weights).sum())
        for name in dict.fromkeys(name for _, chunk in chunks for name in chunk._profiles):
            self.add_profile(name, _mean_of_chunks([(n, c.profiles()[name]) for n, c in chunks if name in c._profiles]))

    def values(self, mean_over_slices: Callable[[Tensor], Tensor] | None = None) -> dict[str, tuple[str, Tensor]]:
        """name -> (mean, min or max, 0-d float32 tensor on the layer's device), in the order of the first recording.

        Args:
            mean_over_slices: averages the elements of a tensor over the ranks that hold slices of the same sequences;
                called once, by all of them. None: this rank has whole sequences.
        """
        squares = [value for reduction, values in self._values.values() if reduction == "rms" for value in values]
        of_sequences = iter(squares)
        if mean_over_slices is not None and squares:
            of_sequences = iter(mean_over_slices(torch.stack(squares).square()).sqrt().unbind())
        found = {}
        for name, (reduction, values) in self._values.items():
            if reduction in ("min", "max"):
                found[name] = (reduction, values[0])
                continue
            parts = [next(of_sequences) for _ in values] if reduction == "rms" else values
            found[name] = ("mean", functools.reduce(Tensor.add, parts) / len(parts))
        return found


def _mean_of_chunks(parts: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Mean over the tokens of time chunks, element by element, of those in which it was measured."""
    values = torch.stack([value for _, value in parts])
    tokens = values.new_tensor([tokens for tokens, _ in parts])[:, None] * ~values.isnan()
    return (values.nan_to_num(0.0) * tokens).sum(0) / tokens.sum(0)


_active: Statistics | None = None
# Whether passes begin where their sequences do.
_at_beginning = True


@contextlib.contextmanager
def recording() -> Iterator[Statistics]:
    """Collect what every layer reports inside the context, over any number of forward passes."""
    global _active
    previous, _active = _active, Statistics()
    try:
        yield _active
    finally:
        _active = previous


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Record nothing inside the context: recomputed activations have been reported once already."""
    global _active
    previous, _active = _active, None
    try:
        yield
    finally:
        _active = previous


@contextlib.contextmanager
def recording_chunk(is_first: bool) -> Iterator[Statistics | None]:
    """Collect apart what a pass over one time chunk of its sequences reports, for `Statistics.add_chunks`.

    None where no recording is on. What is measured on the first tokens of a sequence, later chunks leave out.
    """
    global _at_beginning
    if _active is None:
        yield None
        return
    previous, _at_beginning = _at_beginning, is_first
    try:
        with recording() as recorded:
            yield recorded
    finally:
        _at_beginning = previous


def is_recording() -> bool:
    """Whether `record` keeps anything now; guards work that several records share."""
    return _active is not None


def sees_beginning() -> bool:
    """Whether a recording is on and the tokens of this pass are the first of their sequences."""
    return is_recording() and _at_beginning


def add_chunks(chunks: Sequence[tuple[int, Statistics]]) -> None:
    """`Statistics.add_chunks` of the recording that is on, if there is one."""
    if _active is not None:
        _active.add_chunks(chunks)


def record(name: str, reduction: str, tensor_fn: Callable[[], Tensor]) -> None:
    """Record the 0-d tensor that `tensor_fn` returns; it is called, without gradient, only while a recording is on."""
    if _active is None:
        return
    with torch.no_grad():
        _active.add(name, reduction, tensor_fn())


def record_profile(name: str, tensor_fn: Callable[[], Tensor]) -> None:
    """Record the 1-d tensor that `tensor_fn` returns; it is called, without gradient, only while a recording is on."""
    if _active is None:
        return
    with torch.no_grad():
        _active.add_profile(name, tensor_fn())


def record_rms(name: str, x: Tensor) -> None:
    """Record the root mean square of all elements of `x`."""
    # vector_norm accumulates in the wider dtype without a wider copy of x.
    record(name, "rms", lambda: torch.linalg.vector_norm(x, dtype=compute_dtype(x)) / x.numel() ** 0.5)


def record_gate(name: str, uncapped: Tensor, capped: Tensor, cap: float | None) -> None:
    """Record range, mean and histogram of a gate's pre-activations `capped`, and the share of `uncapped` that `cap`
    saturates."""
    if _active is None:
        return
    record(f"{name}_preact_min", "min", capped.min)
    record(f"{name}_preact_max", "max", capped.max)
    record(f"{name}_preact_mean", "mean", capped.float().mean)
    record_profile(f"{name}_histogram", lambda: histogram(capped))
    record_saturation(f"{name}_soft_cap_saturation", uncapped, cap)


def record_saturation(name: str, uncapped: Tensor, cap: float | None) -> None:
    """Record the share of `uncapped` beyond 0.8 of `cap`; nothing without a cap."""
    if cap is not None:
        record(name, "mean", lambda: (uncapped.abs() > SATURATED_SHARE_OF_CAP * cap).float().mean())


def histogram(values: Tensor) -> Tensor:
    """The share of `values` in each bin: below the first of HISTOGRAM_EDGES, from each edge to the next, from the last
    on. [edges + 1] float32, without waiting for the device."""
    # What is copied from the host waits for the device.
    edges = torch.arange(_EDGES.start, _EDGES.stop, _EDGES.step, dtype=torch.float32, device=values.device)
    below = (values.detach().float().reshape(-1, 1) < edges).mean(0, dtype=torch.float32)
    return torch.cat([below, below.new_ones(1)]) - torch.cat([below.new_zeros(1), below])


def record_forget_rates(name: str, rates: Callable[[], Tensor], heads: int, first_head: int = 0) -> None:
    """Record how fast each head forgets.

    Args:
        rates: returns [own heads], of those from `first_head` on. Those of other ranks are not numbers.
        heads: of the layer.
    """

    def of_all() -> Tensor:
        own = rates()
        found = own.new_full((heads,), torch.nan)
        found[first_head : first_head + len(own)] = own
        return found

    record_profile(f"{name}.forget_rate", of_all)


def forget_rates(fgate_preact: Tensor, over: tuple[int, ...]) -> Tensor:
    """Mean of -log sigmoid(f) over the axes `over`, in nats per token, of pre-activations after the soft cap."""
    return -F.logsigmoid(fgate_preact.float()).mean(over)


def memory_tokens(forget_rate: float) -> float:
    """Tokens after which a head holds 1/e of what it wrote, at its mean rate: 1 / mean(-log sigmoid(f)).

    Infinite for a head that forgets nothing.
    """
    return math.inf if forget_rate == 0 else 1.0 / forget_rate

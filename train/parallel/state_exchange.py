"""How sequence ranks find the sums that enter their slices: three ways to scan summaries, and the choice of one.

Every rank has the summary of its slice (model.sequence.SliceSummary) and needs that of all earlier slices together. The
three ways merge the same summaries in another grouping, and differ in what they send, M being the bytes of a message:

    all_gather           everybody gets everything, and merges the earlier ones itself: (P - 1) M received, one round
    recursive_doubling   windows of 1, 2, 4, ... slices go 1, 2, 4, ... ranks on: log2(P) M at most, log2(P) rounds
    ring                 the merged sums go from rank to rank, in pieces that follow one another: M, P + pieces rounds

A message holds B NH (E + 2) numbers: the values, their log_scale, and the log_kept of the slice.

Sources: all-gather of states, LASP-2 (arXiv 2502.07563); pieces in a chain, ZeCO (arXiv 2507.01004); doubling, Hillis
and Steele, Data Parallel Algorithms (1986). The merge with a maximum: arXiv 2503.13427, section 2.
Axes: R rows of a message (batch x heads), E values of a row, P ranks.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from kernels.mlstm import merge_weights
from train.parallel.mesh import Mesh, Wait

# The pieces that a ring scan aims at: its last rank has everything after P - 2 + pieces of them.
RING_PIECES = 16

Scan = Generator[Wait, None, Tensor | None]


class Line:
    """The sequence ranks one behind the other, from the first slice on, or backwards."""

    def __init__(self, mesh: Mesh, backwards: bool = False):
        self.mesh, self.backwards = mesh, backwards
        self.size = mesh.size_of("sequence")
        self.place = self._turned(mesh.place_in("sequence"))

    def _turned(self, place: int) -> int:
        return self.size - 1 - place if self.backwards else place

    def gather(self, message: Tensor) -> tuple[list[Tensor], Wait]:
        """Begin to collect every rank's message, in the order of the line."""
        gathered, wait = self.mesh.start_gather(message, group="sequence")
        return [gathered[self._turned(place)] for place in range(self.size)], wait

    def pass_on(self, sent: Tensor | None, received: Tensor | None, distance: int = 1) -> Wait:
        """Begin to send to the rank `distance` places on, and to receive from the one as far back; None: not."""
        sends = {} if sent is None else {self._turned(self.place + distance): sent}
        receives = {} if received is None else {self._turned(self.place - distance): received}
        return self.mesh.start_transfers(sends, receives, group="sequence")


def message_of(values: Tensor, log_scale: Tensor, log_kept: Tensor) -> Tensor:
    """[R, E + 2] from values [R, E] and the logarithms [R]."""
    return torch.cat([values, log_scale[:, None], log_kept[:, None]], dim=1)


def parts_of(message: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values [R, E], log_scale [R] and log_kept [R]."""
    return message[:, :-2], message[:, -2], message[:, -1]


def merge(first: Tensor, second: Tensor) -> Tensor:
    """The message of two neighbouring slices as one."""
    first_values, first_scale, first_kept = parts_of(first)
    second_values, second_scale, second_kept = parts_of(second)
    log_scale, kept, added = merge_weights(first_scale, second_kept, second_scale)
    values = (second_values * added[:, None]).addcmul(first_values, kept[:, None])
    return message_of(values, log_scale, first_kept + second_kept)


class StateExchange(Protocol):
    """One way to scan. All numbers are of one rank, at `place` of `size`, and a message of [rows, width]."""

    name: str

    def scan(self, line: Line, message: Tensor) -> Scan:
        """The merged messages of the earlier ranks; None on the first. Yields what to wait for before it goes on."""
        ...

    def received_elements(self, place: int, size: int, rows: int, width: int) -> int:
        """Numbers that the rank receives."""
        ...

    def seconds(self, size: int, message_bytes: float, latency: float, bandwidth: float) -> float:
        """Estimated time until the last rank has what enters its slice."""
        ...


class AllGather:
    """Everybody gets everything."""

    name = "all_gather"

    def scan(self, line: Line, message: Tensor) -> Scan:
        messages, wait = line.gather(message)
        yield wait
        earlier = messages[: line.place]
        return reduce(merge, earlier) if earlier else None

    def received_elements(self, place: int, size: int, rows: int, width: int) -> int:
        return (size - 1) * rows * width

    def seconds(self, size: int, message_bytes: float, latency: float, bandwidth: float) -> float:
        return latency + (size - 1) * message_bytes / bandwidth


class RecursiveDoubling:
    """Windows of slices, twice as long in each round."""

    name = "recursive_doubling"

    def scan(self, line: Line, message: Tensor) -> Scan:
        # The messages of the last `distance` slices up to this one, and of those before this one so far.
        window, before = message, None
        distance = 1
        while distance < line.size:
            sent = window if line.place + distance < line.size else None
            received = torch.empty_like(message) if line.place >= distance else None
            if sent is not None or received is not None:
                yield line.pass_on(sent, received, distance)
            if received is not None:
                before = received if before is None else merge(received, before)
                if line.place + 2 * distance < line.size:
                    window = merge(received, window)
            distance *= 2
        return before

    def received_elements(self, place: int, size: int, rows: int, width: int) -> int:
        # Rounds of distances 1, 2, 4, ... up to `place`.
        return place.bit_length() * rows * width

    def seconds(self, size: int, message_bytes: float, latency: float, bandwidth: float) -> float:
        return math.ceil(math.log2(size)) * (latency + message_bytes / bandwidth)


class Ring:
    """From rank to rank, in pieces, so that all links are busy at once."""

    name = "ring"

    def scan(self, line: Line, message: Tensor) -> Scan:
        parts = _parts(*message.shape)
        own = _split_rows(message, parts)
        pieces = own.chunk(RING_PIECES)
        before = torch.empty_like(own) if line.place > 0 else None
        received = None if before is None else before.chunk(RING_PIECES)
        passed: Tensor | None = None
        for number in range(len(pieces) + 1):
            # The piece that was merged last goes on while the next one comes.
            arriving = received[number] if received is not None and number < len(pieces) else None
            if passed is not None or arriving is not None:
                yield line.pass_on(passed, arriving)
            passed = None
            if number < len(pieces) and line.place < line.size - 1:
                passed = pieces[number] if arriving is None else merge(arriving, pieces[number])
        return None if before is None else _joined_rows(before, parts)

    def received_elements(self, place: int, size: int, rows: int, width: int) -> int:
        if place == 0:
            return 0
        return rows * (width + 2 * (_parts(rows, width) - 1))

    def seconds(self, size: int, message_bytes: float, latency: float, bandwidth: float) -> float:
        return (size - 2 + RING_PIECES) * (latency + message_bytes / RING_PIECES / bandwidth)


def _parts(rows: int, width: int) -> int:
    """In how many rows to split each, so that there are enough of them for the pieces of a ring scan."""
    parts = 1
    while rows * parts < RING_PIECES and (width - 2) % (2 * parts) == 0:
        parts *= 2
    return parts


def _split_rows(message: Tensor, parts: int) -> Tensor:
    """[R, E + 2] -> [R parts, E / parts + 2], each with the logarithms of its row."""
    values = message[:, :-2].unflatten(1, (parts, -1))
    logarithms = message[:, None, -2:].expand(-1, parts, -1)
    return torch.cat([values, logarithms], dim=2).flatten(0, 1)


def _joined_rows(message: Tensor, parts: int) -> Tensor:
    """The way back."""
    split = message.unflatten(0, (-1, parts))
    return torch.cat([split[:, :, :-2].flatten(1), split[:, 0, -2:]], dim=1)


EXCHANGES: dict[str, StateExchange] = {
    exchange.name: exchange for exchange in (AllGather(), RecursiveDoubling(), Ring())
}
AUTO = "auto"


@dataclass(frozen=True)
class Links:
    """What the ranks are connected by: how many of them there are on how many hosts, and what a link does.

    Attributes:
        size, hosts: ranks that share a sequence, and hosts that they are on.
    """

    size: int
    hosts: int

    @property
    def latency(self) -> float:
        """Seconds of a round without content: kernels of NCCL and of the merge, and between hosts the network."""
        return 50e-6 if self.hosts > 1 else 30e-6

    @property
    def bandwidth(self) -> float:
        """Bytes per second of a GPU: 400 Gbit/s between hosts, NVLink of the Hopper generation within one."""
        return 50e9 if self.hosts > 1 else 450e9

    def __str__(self) -> str:
        return f"{self.size} ranks on {self.hosts} host{'s' if self.hosts > 1 else ''}"


@dataclass(frozen=True)
class Choice:
    """A way to scan, and why this one."""

    exchange: StateExchange
    reason: str


def choose(name: str, links: Links, message_bytes: int) -> Choice:
    """The exchange called `name`; of "auto" the one whose estimate is the shortest.

    The estimates count latency and bytes of the links; every rank arrives at the same choice.
    """
    if name != AUTO:
        return Choice(EXCHANGES[name], f"{name}, as the configuration says")
    seconds = {
        exchange.name: exchange.seconds(links.size, message_bytes, links.latency, links.bandwidth)
        for exchange in EXCHANGES.values()
    }
    # The first of equals needs the fewest rounds.
    best = min(seconds, key=lambda candidate: seconds[candidate])
    estimates = ", ".join(f"{candidate} {1e6 * time:,.0f}" for candidate, time in seconds.items())
    return Choice(
        EXCHANGES[best],
        f"{best} for {links} and {message_bytes / 2**20:.3g} MiB a message: estimated microseconds {estimates}",
    )

"""How fast processes exchange: by measured collectives of a calibration, else by data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from train.estimate.calibration import Calibration, CollectivePoint

# Bytes a second that a GPU sends and receives at once, by data sheet: NVLink of H100 and H200 boards.
NVLINK = 450e9
# Of a data sheet's rate, what collectives of large tensors reach.
REACHED = 0.8
# Seconds of one collective, however small; more between nodes.
LATENCY = 30e-6


@dataclass(frozen=True)
class Links:
    """The ranks of a run and what connects them.

    Attributes:
        nodes, ranks: of the run; ranks lie node after node.
        inside, between: bytes a second that a rank sends and receives within a node, and a node to others.
        inside_is_measured, between_is_measured: whether they are of measured collectives, else of data sheets.
    """

    nodes: int
    ranks: int
    inside: float
    between: float
    inside_is_measured: bool
    between_is_measured: bool

    @classmethod
    def of(cls, calibration: Calibration, nodes: int, ranks: int, network_gbit: float) -> Links:
        """`network_gbit`: of the network, in Gbit/s for each GPU of a node."""
        of_node = max(1, ranks // nodes)
        inside, between = NVLINK * REACHED, network_gbit / 8 * 1e9 * of_node * REACHED
        measured = [point for point in calibration.collectives if point.operation == "all_reduce"]
        if within := [point for point in measured if point.nodes == 1]:
            # More ranks use more links: the measurement with the nearest number.
            inside = _bus_rate(min(within, key=lambda point: abs(point.ranks - of_node)))
        beyond = [point for point in measured if point.nodes > 1]
        if beyond:
            between = _bus_rate(min(beyond, key=lambda point: abs(point.nodes - nodes)))
        return cls(nodes, ranks, inside, between, bool(within), bool(beyond))

    def gather(self, count: float, ranks: int) -> float:
        """Seconds until each of so many ranks, neighbours, has all of `count` bytes; to reduce and scatter as well."""
        if ranks <= 1:
            return 0.0
        rate = self.inside if ranks <= max(1, self.ranks // self.nodes) else min(self.inside, self.between)
        return LATENCY + count * (ranks - 1) / ranks / rate

    def send(self, count: float, ranks: int) -> float:
        """Seconds of `count` bytes to the rank that many places on."""
        is_near = ranks < max(1, self.ranks // self.nodes)
        of_node = max(1, self.ranks // self.nodes)
        return LATENCY + count / (self.inside if is_near or self.nodes == 1 else self.between / of_node)

    def reduce(self, count: float, ranks: int) -> float:
        """Seconds until each of so many ranks has the sum of all ranks' `count` bytes."""
        return 2 * self.gather(count, ranks)


def _bus_rate(point: CollectivePoint) -> float:
    """Bytes a second that each rank sends and receives, as NCCL's tests count them."""
    return 2 * point.bytes * (point.ranks - 1) / point.ranks / point.seconds

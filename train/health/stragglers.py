"""Which rank the others wait for, by how long each is busy with its own work."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from train.watch.whereabouts import BETWEEN_STEPS, DATA, FORWARD


@dataclass(frozen=True)
class Lag:
    """How far a rank is behind the median of the others."""

    rank: int
    # Seconds a step, and the phase that most of them are lost in.
    seconds: float
    phase: str


def compared_phases(zero_stage: int, stages: int) -> tuple[str, ...]:
    """The phases in which a rank's time is its own, apart from collectives of the mesh. In others, and with weights
    that are gathered or stages that wait for each other, DeepSpeed's collectives make all ranks equally slow."""
    return (DATA, BETWEEN_STEPS) if zero_stage == 3 or stages > 1 else (DATA, FORWARD, BETWEEN_STEPS)


def lags(own: Mapping[int, Mapping[str, float]], phases: Sequence[str]) -> list[Lag]:
    """Of every rank, the one furthest behind first. `own`: rank -> phase -> seconds a step. [] of less than two."""
    if len(own) < 2:
        return []
    found = []
    for rank, mine in own.items():
        behind = {
            phase: mine.get(phase, 0.0)
            - statistics.median(other.get(phase, 0.0) for number, other in own.items() if number != rank)
            for phase in phases
        }
        found.append(Lag(rank, sum(behind.values()), max(behind, key=lambda phase: behind[phase])))
    return sorted(found, key=lambda lag: -lag.seconds)


class Persistent:
    """Tells what is so in several looks in a row, once until it is otherwise."""

    def __init__(self, looks: int):
        self._looks = looks
        self._in_a_row: dict[object, int] = {}

    def new(self, found: Sequence[object]) -> list[object]:
        """What `found`, of this look, has for the `looks`-th time in a row."""
        self._in_a_row = {what: self._in_a_row.get(what, 0) + 1 for what in found}
        return [what for what, times in self._in_a_row.items() if times == self._looks]

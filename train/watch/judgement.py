"""Which rank holds the others up, by what all of them say of themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from train.watch.whereabouts import LEFT, Position


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself, again and again."""

    # Of the beats of its process: one that is not followed by another is its last.
    number: int
    position: Position
    # The thread that trains is inside a collective, and so waits for others.
    waits: bool
    host: str
    process: int
    # When the process began, in seconds since 1970: another may have its number later.
    created: float
    # It reads over a network, which has its own limits on time; how that fails at present, "" where it does not.
    is_reading: bool = False
    trouble: str = ""

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Beat:
        content = json.loads(text)
        return cls(**content | {"position": Position(**content["position"])})

    def describe(self, rank: int) -> str:
        """The rank, for a reader."""
        return f"rank {rank} (process {self.process} on {self.host})"


@dataclass(frozen=True)
class Culprit:
    """A rank that the others wait for."""

    rank: int
    beat: Beat
    # Seconds since it last moved, or answered.
    since: float
    # Its process itself does nothing: it is stopped, or gone.
    is_silent: bool

    def __str__(self) -> str:
        who, where = self.beat.describe(self.rank), str(self.beat.position)
        where += f", where {self.beat.trouble}" if self.beat.trouble else ""
        if self.is_silent:
            return f"{who} has not answered for {self.since:.0f} s; it was last seen in {where}"
        return f"{who} has not moved for {self.since:.0f} s: it is in {where}"


@dataclass
class _Sighting:
    beat: Beat
    # When another beat was first seen, and another position.
    answered: float
    moved: float


class Judge:
    """Compares what ranks say at different times. Times are seconds of one clock of this process."""

    def __init__(self, seconds: float, long_seconds: float):
        """`seconds`: that a rank may stay in one phase of a step; `long_seconds`: in phases that may take long."""
        self.seconds = seconds
        self._long_seconds = max(seconds, long_seconds)
        self._sightings: dict[int, _Sighting] = {}

    def see(self, beats: Mapping[int, Beat], now: float) -> None:
        """What ranks last said, as found at `now`."""
        for rank, beat in beats.items():
            before = self._sightings.get(rank)
            if before is None:
                self._sightings[rank] = _Sighting(beat, now, now)
                continue
            if beat.position != before.beat.position:
                before.moved = now
            if beat.number != before.beat.number:
                before.answered = now
            before.beat = beat

    def forget_all_but(self, rank: int) -> None:
        """Nothing more is heard of the others."""
        self._sightings = {seen: sighting for seen, sighting in self._sightings.items() if seen == rank}

    def excuse(self, seconds: float) -> None:
        """This process was away itself for so long: what others did meanwhile is not known."""
        for sighting in self._sightings.values():
            sighting.answered += seconds
            sighting.moved += seconds

    def present(self) -> dict[int, Beat]:
        """Ranks that have not left, and what they last said."""
        return {rank: one.beat for rank, one in self._sightings.items() if one.beat.position.phase != LEFT}

    def silent(self, seconds: float, now: float) -> list[int]:
        """Ranks that have not answered for so long."""
        return [rank for rank in self.present() if now - self._sightings[rank].answered > seconds]

    def culprits(self, now: float) -> list[Culprit]:
        """The ranks that have held the others up for too long; [] while all is well.

        Those that do not answer. Otherwise the ones that are furthest behind, of those that do not wait for others;
        where all wait, of all.
        """
        present = self.present()
        silent = [rank for rank in self.silent(self.seconds, now) if present[rank].position.turn]
        silent += self.silent(self._long_seconds, now)
        if silent:
            return [
                Culprit(rank, present[rank], now - self._sightings[rank].answered, True) for rank in sorted(set(silent))
            ]
        candidates = [rank for rank, beat in present.items() if not beat.waits] or list(present)
        last = min((present[rank].position for rank in candidates), default=None)
        return [
            Culprit(rank, present[rank], since, False)
            for rank in candidates
            if present[rank].position == last
            and (since := now - self._sightings[rank].moved) > self._limit(present[rank])
        ]

    def _limit(self, beat: Beat) -> float:
        return self._long_seconds if beat.position.may_take_long or beat.is_reading else self.seconds

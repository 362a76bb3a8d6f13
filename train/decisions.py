"""What a callback may decide about the course of the run.

What one rank decides is a wish; all ranks agree on one decision at the end of a step, the one that comes last here
where wishes differ. The wishes that were not followed are asked about again at the next step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Continue:
    """Go on."""


@dataclass(frozen=True)
class Stop:
    """End the run after this step, with a checkpoint. `reason` is told to whoever reads events.jsonl."""

    reason: str


@dataclass(frozen=True)
class Rollback:
    """Go back to the checkpoint of `step`, or to the newest before it, and leave out data.

    The beginning of the run counts as the checkpoint of step 0. `skip`: optimizer steps whose samples, counted from the
    position of that checkpoint, are not read again; None: all that the run has read since. `reason` is told to whoever
    reads events.jsonl.
    """

    step: int
    skip: int | None
    reason: str = ""


Decision = Continue | Stop | Rollback
CONTINUE = Continue()


def agreed(wishes: Iterable[Decision]) -> Decision:
    """The one decision that follows from the wishes of all ranks, which every rank has in the same order.

    A rollback comes before a stop: what a stop saves should be worth resuming. Of several rollbacks the one that goes
    back furthest counts.
    """
    wishes = list(wishes)
    rollbacks = [wish for wish in wishes if isinstance(wish, Rollback)]
    if rollbacks:
        return min(rollbacks, key=lambda wish: wish.step)
    return next((wish for wish in wishes if isinstance(wish, Stop)), CONTINUE)

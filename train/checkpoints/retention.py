"""Which checkpoints of a run stay when others go to make room: one rule for the run, its mirror and `prune`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """What stays whatever room it takes. Checkpoints that a user keeps (`layout.stays`) stay beside these."""

    # So many of the newest.
    keep_last: int
    # Those at multiples of this step; None: none for that.
    keep_every: int | None = None
    # These steps: the best by a held-out set, and those before the schedule's last phase.
    staying: frozenset[int] = frozenset()
    # The newest of this step or before: the run may go back to it. None: it may not.
    going_back: int | None = None

    def surplus(self, steps: Sequence[int]) -> list[int]:
        """Those of `steps`, ascending, that need not stay."""
        kept = {*steps[-self.keep_last :], *self.lasting(steps)}
        if self.going_back is not None:
            kept |= set([step for step in steps if step <= self.going_back][-1:])
        return [step for step in steps if step not in kept]

    def lasting(self, steps: Sequence[int]) -> list[int]:
        """Those of `steps` that stay when newer ones come."""
        every = self.keep_every
        return [step for step in steps if step in self.staying or (every is not None and step % every == 0)]

"""Where a rank is in its step: marked by the thread that trains, read by the watchdog's.

All ranks pass the same phases in the same order, so that of two ranks the one that is behind can be told.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from train.watch.phase_clock import PhaseClock

START = "start"
DATA = "data"
FORWARD = "forward"
BACKWARD = "backward"
# Of a pipeline stage, which does both by turns.
FORWARD_AND_BACKWARD = "forward and backward"
# Sums over ranks: of gradients and of what is told of a step.
REDUCE = "reduce"
STEP = "step"
# Metrics, and whatever callbacks do at the end of a step.
BETWEEN_STEPS = "between steps"
EVALUATE = "evaluate"
SAVE = "save"
SAMPLE = "sample"
END = "end"
# The rank has left the run, and nobody waits for it any more.
LEFT = "left"

# They wait for disks, for other machines, or for much text.
_LONG = (START, SAVE, SAMPLE, END)


@dataclass(frozen=True, order=True)
class Position:
    """Of two positions the smaller one is behind."""

    # Steps begun by this process, those repeated after a rollback counted again, and phases begun in the step.
    turn: int = 0
    moves: int = 0
    # Index of the step, as the run counts.
    step: int = 0
    phase: str = START
    # The phase has not been left before: caches are empty, kernels not yet compiled.
    is_first: bool = True

    @property
    def may_take_long(self) -> bool:
        """Whether the phase may take much longer than a phase of a step does. In the first step code is compiled in
        any of its passes."""
        return self.is_first or self.turn <= 1 or self.phase in _LONG

    def __str__(self) -> str:
        return f"'{self.phase}' of step {self.step}" if self.turn else f"'{self.phase}', before the first step"


class Whereabouts:
    """The position of this rank; one object for each process of a run."""

    def __init__(self, clock: PhaseClock | None = None) -> None:
        self.clock = clock or PhaseClock()
        # Replaced as a whole: a thread that reads it sees one position or the next.
        self.now = Position()
        # Where the thread that trains met an exception; None: it has met none.
        self.failed_at: Position | None = None
        self._left = set[str]()

    def begin_step(self, step: int) -> None:
        """The step of index `step` begins, with its data."""
        self.now = replace(self.now, turn=self.now.turn + 1, moves=-1, step=step)
        self.enter(DATA)

    def fail(self) -> None:
        """An exception ends the training; what follows is the end."""
        self.failed_at = self.now

    def enter(self, phase: str) -> None:
        """Leave the phase before and begin this one; again, where it is the same. Every rank says so."""
        before = self.now
        self._left.add(before.phase)
        self.clock.enter(phase)
        self.now = replace(before, moves=before.moves + 1, phase=phase, is_first=phase not in self._left)

"""Samples of a run's order that no optimizer step reads, as windows (first sample, how many).

A step reads consecutive samples. One that would read any of a window begins behind it instead, a whole number of steps
further on: the place of a sample in its batch stays what it is, which training that carries state asks for. So where a
step begins follows from where the one before ended, and a run's position in its data remains one integer.
"""

from __future__ import annotations

from collections.abc import Sequence

Windows = Sequence[tuple[int, int]]


def begin_of_step(position: int, global_batch_size: int, left_out: Windows) -> int:
    """The first sample of the step that follows `position`."""
    while ends := [
        first + count for first, count in left_out if position < first + count and first < position + global_batch_size
    ]:
        position += -(-(max(ends) - position) // global_batch_size) * global_batch_size
    return position


def position_after(position: int, steps: int, global_batch_size: int, left_out: Windows) -> int:
    """The position behind so many steps that follow `position`."""
    for first, count in sorted(left_out):
        before = min(steps, max(0, first - position) // global_batch_size)
        if first + count > position and before < steps:
            position = begin_of_step(position + before * global_batch_size, global_batch_size, left_out)
            steps -= before
    return position + steps * global_batch_size

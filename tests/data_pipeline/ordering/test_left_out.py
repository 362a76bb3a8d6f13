"""Steps that would read a sample that is left out begin behind it."""

import itertools
import random

import pytest

from data_pipeline.ordering.left_out import begin_of_step, position_after


@pytest.mark.parametrize(
    ("position", "left_out", "begins"),
    [
        (16, [], 16),
        # The step reads 16 to 23.
        (16, [(24, 8)], 16),
        (16, [(8, 8)], 16),
        (16, [(23, 1)], 24),
        (16, [(16, 8)], 24),
        (16, [(10, 7)], 24),
        (16, [(20, 5)], 32),
        # Into a window, and out of it again.
        (16, [(16, 1), (30, 30)], 64),
        (0, [(0, 1_000_000_000)], 1_000_000_000),
    ],
)
def test_a_step_begins_a_whole_number_of_steps_further_on(position, left_out, begins):
    assert begin_of_step(position, 8, left_out) == begins
    assert begin_of_step(position, 8, left_out[::-1]) == begins


def test_the_position_after_many_steps_is_that_of_one_after_another():
    draw = random.Random(0)
    for _ in range(300):
        left_out = [(draw.randrange(200), draw.randrange(1, 60)) for _ in range(draw.randrange(5))]
        start, size, steps = draw.randrange(50), draw.randrange(1, 12), draw.randrange(40)
        position = start
        for _ in range(steps):
            position = begin_of_step(position, size, left_out)
            read = set(range(position, position + size))
            assert not read & set(itertools.chain(*(range(first, first + count) for first, count in left_out)))
            position += size
        assert position_after(start, steps, size, left_out) == position, (start, size, steps, left_out)

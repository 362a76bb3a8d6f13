"""What DeepSpeed holds in a step: the table of its module, and what of it was measured."""

import pytest

from model.presets import preset
from train.config import ParallelConfig, PrecisionConfig, RunConfig
from train.parallel.step_memory import Held, StepMemory, step_memory

SMALL = Held(100_000_000, 20_000_000)
LARGE = Held(4_000_000_000, 200_000_000)


def memory(stage, held, ranks=1, units=1, captures=False, compute="bf16"):
    config = RunConfig(
        model=preset("tiny"), parallel=ParallelConfig(zero_stage=stage), precision=PrecisionConfig(compute)
    )
    return step_memory(config, held, ranks, units, captures)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (memory(0, SMALL, ranks=2), StepMemory(400e6, 0, 800e6)),
        (memory(0, LARGE, ranks=2), StepMemory(16e9, 0, 18e9)),
        (memory(1, SMALL, ranks=2), StepMemory(400e6, 0, 1200e6)),
        (memory(1, SMALL, ranks=2, units=2), StepMemory(600e6, 0, 1200e6)),
        (memory(1, SMALL, captures=True), StepMemory(600e6, 0, 1200e6)),
        (memory(1, LARGE, units=4), StepMemory(24e9, 0, 27e9)),
        (memory(1, SMALL, ranks=2, compute="fp32"), StepMemory(400e6, 2e9, 600e6)),
        (memory(2, LARGE, ranks=4), StepMemory(0, 1e9, 4e9 + 3.8e9)),
        (memory(2, LARGE, ranks=4, units=2), StepMemory(4e9, 1e9, 7.8e9)),
        (memory(3, SMALL, ranks=4, units=2), StepMemory(100e6, 1e9 + 200e6, 100e6)),
        (memory(3, LARGE, ranks=4), StepMemory(4e9, 1e9 + 2e9, 4e9)),
    ],
)
def test_each_stage_holds_what_its_row_says(found, expected):
    assert found == expected


def test_an_update_needs_what_was_measured():
    """Steps of too few tokens for their passes to count: 204,301,376 parameters took 8.01 bytes each beside the 18 of
    weights, sum of gradients and optimizer."""
    held = Held(204_301_376, 0)
    assert memory(1, held).at_the_end - 4 * held.parameters == pytest.approx(1_637_000_000, rel=0.005)

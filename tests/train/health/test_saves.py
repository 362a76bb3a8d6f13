"""Checkpoints that take unusually long are told of."""

import pytest

from tests.documented import keys_and_types, table
from tests.runs import run_train
from train.health.config import HealthConfig
from train.health.saves import SaveTimes
from train.run_directory import read_events

CONFIG = HealthConfig(slow_save_seconds=0.0)


def test_a_save_is_compared_with_those_of_the_run():
    saves = SaveTimes()
    assert [saves.problem(seconds, None, CONFIG) for seconds in (9.0, 1.0, 1.1)] == ["", "", ""]
    assert SaveTimes().problem(9.9, 10.0, HealthConfig()) == "", "far too little for anybody to care"
    assert saves.problem(3.2, 100.0, CONFIG) == ""
    words = saves.problem(7.0, 100.0, CONFIG)
    assert words == "took 7 s to write, more than 3 times the 2.15 s that others took (health.slow_save_factor)"


def test_a_save_is_compared_with_the_time_between_two():
    saves = SaveTimes()
    assert saves.problem(4.9, 10.0, CONFIG) == ""
    words = saves.problem(6.0, 10.0, CONFIG)
    assert words == "took 6 s to write, more than 50% of the 10 s since the one before (health.slow_save_share)"


@pytest.mark.slow
def test_a_run_tells_of_saves_that_take_most_of_its_time(tiny_run, tmp_path):
    settings = [
        "training.total_steps=8",
        "checkpoint.interval=2",
        "health.slow_save_share=1e-9",
        "health.slow_save_seconds=0",
    ]
    done = run_train([*tiny_run, *settings])
    assert done.returncode == 0, done.stderr
    found = [line for line in read_events(tmp_path / "run") if line["event"] == "slow_save"]
    documented = keys_and_types([row for row in table("training.md", "event") if row[0] == "`slow_save`"])
    assert found and all(line.keys() - {"time", "event"} == documented.keys() for line in found)
    # Nothing is known of the time before the first.
    assert "step-00000002" not in [line["checkpoint"] for line in found]
    assert f"WARNING    {found[0]['checkpoint']} took" in done.stderr

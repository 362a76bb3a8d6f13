"""Learning-rate schedules: values at the corners, published recipes, and every validation message."""

import dataclasses
import math

import pytest

import conf
from train.schedule import DECAY_SHAPES, ScheduleConfig, duration_in_steps, learning_rate, validate_schedule

COSINE = ScheduleConfig(kind="cosine", warmup=10, final_factor=0.1)
WSD = ScheduleConfig(kind="wsd", warmup=10, decay=20, decay_shape="linear", final_factor=0.0)
EXPONENTIAL_7B = ScheduleConfig(kind="exponential", warmup=3000, decay=495_000, final_factor=0.1, cooldown=7000)
PRESETS = ("cosine", "linear_to_zero", "wsd", "xlstm_7b_exponential", "constant")


def load(name: str) -> ScheduleConfig:
    from omegaconf import OmegaConf

    return conf.to_dataclass(ScheduleConfig, OmegaConf.load(conf.CONF_DIR / "schedule" / f"{name}.yaml"))


def test_warmup_rises_linearly_from_the_first_step_to_the_peak():
    rates = [learning_rate(COSINE, 2.0, step, 100) for step in range(11)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[9] == rates[10] == 2.0


def test_cosine_is_halfway_in_the_middle_and_final_at_the_end():
    assert learning_rate(COSINE, 1.0, 55, 100) == pytest.approx(0.55)
    assert learning_rate(COSINE, 1.0, 100, 100) == pytest.approx(0.1)
    assert learning_rate(COSINE, 1.0, 5000, 100) == pytest.approx(0.1)


def test_cosine_of_the_15b_token_runs_is_cut_off_by_the_end_of_the_run():
    # arXiv 2405.04517: a schedule over 30,000 steps, evaluated after 28,170.
    config = ScheduleConfig(kind="cosine", warmup=750, decay=29_250, final_factor=0.1)
    assert validate_schedule(config, 28_170) == []
    progress = (28_170 - 750) / 29_250
    expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
    assert learning_rate(config, 1.0, 28_170, 28_170) == pytest.approx(expected)


def test_cosine_with_cooldown_falls_to_zero_from_where_it_stood():
    # The scaling-law recipe: cosine to a tenth, then 1,000 steps to 0.
    config = ScheduleConfig(kind="cosine", warmup=750, final_factor=0.1, cooldown=1000)
    assert learning_rate(config, 1.0, 9000, 10_000) == pytest.approx(0.1)
    assert learning_rate(config, 1.0, 9500, 10_000) == pytest.approx(0.05)
    assert learning_rate(config, 1.0, 10_000, 10_000) == 0.0


def test_linear_to_zero_wastes_no_step_on_a_rate_of_zero():
    config = load("linear_to_zero")
    assert learning_rate(config, 1.0, 99, 100) == pytest.approx(1 / 99)
    assert learning_rate(config, 1.0, 100, 100) == 0.0


@pytest.mark.parametrize("shape, middle", [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)])
def test_wsd_is_stable_then_decays_with_its_shape(shape, middle):
    config = dataclasses.replace(WSD, decay_shape=shape)
    assert {learning_rate(config, 3.0, step, 100) for step in range(10, 81)} == {3.0}
    assert learning_rate(config, 3.0, 90, 100) == pytest.approx(3.0 * middle)
    assert learning_rate(config, 3.0, 100, 100) == pytest.approx(0.0, abs=1e-15)


def test_the_7b_schedule_reaches_the_published_values():
    total = 550_000
    rate = lambda step: learning_rate(EXPONENTIAL_7B, 4e-4, step, total)  # noqa: E731
    assert rate(0) == pytest.approx(4e-4 / 3000)
    assert rate(3000) == 4e-4
    assert rate(498_000) == pytest.approx(4e-5)
    assert rate(543_000) == pytest.approx(4e-4 * 0.0811, rel=1e-3)
    assert rate(546_500) == pytest.approx(rate(543_000) / 2)
    assert rate(550_000) == 0.0
    assert load("xlstm_7b_exponential") == EXPONENTIAL_7B


def test_a_schedule_depends_on_nothing_but_its_arguments():
    forwards = [learning_rate(WSD, 1.0, step, 100) for step in range(100)]
    backwards = [learning_rate(WSD, 1.0, step, 100) for step in reversed(range(100))]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("duration, steps", [(None, 0), (0, 0), (7, 7), (3e3, 3000), (0.01, 20), (0.0004, 1), (1, 1)])
def test_durations_are_steps_or_a_share_of_the_run(duration, steps):
    assert duration_in_steps(duration, 2000) == steps


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_composes_and_is_valid_and_never_negative(name):
    config = load(name)
    assert validate_schedule(config, 550_000) == []
    assert all(0 <= learning_rate(config, 1.0, step, 550_000) <= 1 for step in range(0, 550_001, 1000))


def test_every_preset_file_is_tested():
    assert sorted(path.stem for path in (conf.CONF_DIR / "schedule").glob("*.yaml")) == sorted(PRESETS)


def test_a_run_without_any_step_left_for_the_decay_keeps_defined_values():
    config = ScheduleConfig(kind="cosine", warmup=4, final_factor=0.1)
    assert validate_schedule(config, 4) == []
    assert [learning_rate(config, 1.0, step, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="not for step -1"):
        learning_rate(COSINE, 1.0, -1, 100)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "cosin"}, r"schedule.kind: no such schedule \('cosin'\); choose one of cosine, linear"),
        ({"decay_shape": "linear"}, r"schedule.decay_shape: set \(linear\), but kind=cosine does not use it"),
        ({"kind": "constant"}, r"schedule.final_factor: set \(0.1\), but kind=constant does not use it"),
        ({"kind": "linear", "cooldown": 5}, r"schedule.cooldown: set \(5\), but kind=linear does not use it"),
        ({"kind": "wsd", "decay_shape": "sqrt"}, r"schedule.decay: kind=wsd needs a value"),
        ({"final_factor": None}, r"schedule.final_factor: kind=cosine needs a value"),
        ({"final_factor": 10.0}, r"schedule.final_factor: must lie in 0..1 \(10.0\)"),
        ({"warmup": -1}, r"schedule.warmup: not a duration \(-1\)"),
        ({"warmup": True}, r"schedule.warmup: not a duration \(True\)"),
        ({"warmup": 2.5}, r"schedule.warmup: steps come in whole numbers \(2.5\)"),
        ({"warmup": 1.0}, r"schedule.warmup: 1.0 is neither"),
        ({"kind": "exponential", "decay": 5, "final_factor": 0.0}, r"schedule.final_factor: an exponential never"),
        ({"kind": "wsd", "decay": 0, "decay_shape": "sqrt"}, r"schedule.decay: 0 of the run's 100 steps rounds"),
        (
            {"kind": "wsd", "decay": 0.001, "decay_shape": "sqrt"},
            r"schedule.decay: 0.001 of the run's 100 steps rounds",
        ),
        ({"kind": "wsd", "decay": 5, "decay_shape": "square"}, r"schedule.decay_shape: no such shape \('square'\)"),
        (
            {"warmup": 60, "cooldown": 50},
            r"schedule: warmup 60 \+ cooldown 50 = 110 steps do not fit into the run's 100",
        ),
    ],
)
def test_each_mistake_has_its_message(changes, message):
    problems = validate_schedule(dataclasses.replace(COSINE, **changes), 100)
    assert len(problems) == 1
    with pytest.raises(conf.ConfigError, match=message):
        raise conf.ConfigError(problems)


def test_all_problems_come_at_once():
    config = ScheduleConfig(kind="wsd", warmup=-3, decay=None, decay_shape=None, final_factor=None)
    assert len(validate_schedule(config, 100)) == 4


def test_decay_shapes_all_fall_from_one_to_zero():
    for shape in DECAY_SHAPES:
        config = dataclasses.replace(WSD, decay_shape=shape)
        rates = [learning_rate(config, 1.0, step, 100) for step in range(80, 101)]
        assert rates == sorted(rates, reverse=True)
        assert rates[0] == 1.0

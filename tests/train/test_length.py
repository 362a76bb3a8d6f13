"""How long a run is and where its schedule stands, when the batch or the sequence length changes on the way."""

import dataclasses
import functools
import json

import pytest

from conf import compose
from train.checkpoints.state import TrainState, read_state
from train.config import RunConfig
from train.length import begin, last_step, learning_rate_of_next_step, steps_left, taken_over
from train.plan import make_plan
from train.schedule import ScheduleConfig
from train.validate import validate

BASE = ["name=x", "corpus.directory=y", "model=tiny", "training.sequence_length=32", "training.micro_batch_size=1"]
SCHEDULES = {
    "cosine": ScheduleConfig("cosine"),
    "cosine in steps": ScheduleConfig("cosine", warmup=7, cooldown=9),
    "linear": ScheduleConfig("linear", warmup=5, final_factor=0.0),
    "wsd": ScheduleConfig("wsd", warmup=6, decay=20, decay_shape="sqrt", final_factor=0.0),
    "exponential": ScheduleConfig("exponential", warmup=3, decay=30, cooldown=8),
}


@functools.cache
def base():
    return compose(RunConfig, "train", [*BASE, "training.total_steps=1"])


def configured(samples=8, schedule=SCHEDULES["cosine"], *, total_tokens=None, total_steps=None):
    training = dataclasses.replace(base().training, total_tokens=total_tokens, total_steps=total_steps)
    return batch(dataclasses.replace(base(), training=training, schedule=schedule), samples)


def batch(config, samples, length=32):
    training = dataclasses.replace(config.training, global_batch_size=samples, sequence_length=length)
    return dataclasses.replace(config, training=training)


def trained(config, state, steps):
    """`state` after `steps` more steps of `config`; the rates of these steps by the tokens before each."""
    rates = {}
    for _ in range(steps):
        rates[state.tokens] = learning_rate_of_next_step(config, state)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            applied_steps=state.applied_steps + 1,
            tokens=state.tokens + config.tokens_per_step,
            applied_tokens=state.applied_tokens + config.tokens_per_step,
        )
    return state, rates


@pytest.mark.parametrize(
    "samples, length, steps", [(8, 32, 32), (32, 32, 14), (2, 32, 104), (8, 128, 14), (24, 32, 16)]
)
def test_a_budget_in_tokens_ends_at_the_first_step_that_reaches_it(samples, length, steps):
    config = configured(total_tokens=8192)
    state, _ = trained(config, begin(config, {}), 8)
    assert (state.tokens, steps_left(config, state), last_step(config, state)) == (2048, 24, 32)
    config = batch(config, samples, length)
    state = taken_over(config, state)
    assert last_step(config, state) == steps
    state, _ = trained(config, state, steps_left(config, state))
    assert steps_left(config, state) == 0 and 8192 <= state.tokens < 8192 + config.tokens_per_step
    # A run that has more tokens than it is asked for has ended, too.
    assert last_step(configured(total_tokens=100), state) == state.step


def test_a_length_in_steps_counts_steps_whatever_their_size():
    config = configured(total_steps=20)
    state, _ = trained(config, begin(config, {}), 8)
    assert steps_left(batch(config, 64), state) == 12 and last_step(batch(config, 64), state) == 20


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("samples, length", [(16, 32), (2, 32), (8, 64)])
def test_a_schedule_over_tokens_is_the_same_curve_under_another_batch(schedule, samples, length):
    config = configured(8, schedule, total_tokens=16384)
    _, curve = trained(config, begin(config, {}), 64)
    state, rates = trained(config, begin(config, {}), 16)
    # There and back, so that steps count as those of the beginning and not of the time before.
    for samples_now, length_now in ((samples, length), (8, 32), (samples, length)):
        config = batch(config, samples_now, length_now)
        state, more = trained(config, taken_over(config, state), 8)
        rates |= more
    common = curve.keys() & rates.keys()
    assert len(common) >= 25 and max(common) > 6000
    assert {tokens: rates[tokens] for tokens in common} == {tokens: curve[tokens] for tokens in common}


def test_a_batch_that_never_changes_gives_the_rates_of_a_run_in_steps_bit_for_bit():
    for schedule in SCHEDULES.values():
        in_tokens = configured(8, schedule, total_tokens=16100)
        in_steps = configured(8, schedule, total_steps=63)
        (_, a), (_, b) = (trained(config, begin(config, {}), 63) for config in (in_tokens, in_steps))
        assert a == b


def test_a_schedule_that_is_set_anew_counts_steps_of_todays_batch():
    constant = configured(8, ScheduleConfig("constant", final_factor=None), total_tokens=8192)
    state, _ = trained(constant, begin(constant, {}), 16)
    anneal = ScheduleConfig("wsd", warmup=0, decay=4, decay_shape="linear", final_factor=0.0)
    config = configured(16, anneal, total_tokens=8192)
    state = taken_over(config, state)
    _, rates = trained(config, state, steps_left(config, state))
    shares = [rate / config.optimizer.learning_rate for rate in rates.values()]
    assert shares == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_whether_a_schedule_fits_is_told_in_the_steps_that_it_counts():
    config = configured(8, ScheduleConfig("cosine", warmup=10, cooldown=10), total_tokens=8192)
    state, _ = trained(config, begin(config, {}), 16)
    larger = batch(config, 32)
    assert validate(larger, 1, state) == []
    (problem,) = validate(larger, 1)
    assert "warmup 10 + cooldown 10 = 20 steps do not fit into the run's 8 steps" in problem


def test_the_plan_of_a_resumed_run_speaks_of_what_is_left():
    config = configured(total_tokens=8192)
    state, _ = trained(config, begin(config, {}), 8)
    state = dataclasses.replace(state, next_sample=100)
    config = batch(config, 16)
    plan, whole = (make_plan(config, 2, "NVIDIA H100", s) for s in (state, None))
    assert (plan.total_steps, plan.total_tokens, plan.steps_left, plan.tokens_left) == (20, 8192, 12, 6144)
    assert (plan.completed_steps, plan.completed_tokens, plan.total_samples) == (8, 2048, 100 + 12 * 16)
    assert "left       12 steps, 6,144 tokens, of 20 steps, 8,192 tokens (" in plan.describe()
    assert " h left at 35%" in plan.describe() and " left" not in whole.describe()
    assert plan.predicted_seconds == pytest.approx(whole.predicted_seconds * 6144 / 8192)


def test_the_state_of_0_2_0_is_read_as_one_of_a_steady_batch(tmp_path):
    config = configured(total_tokens=8192)
    state, _ = trained(config, begin(config, {}), 6)
    state = dataclasses.replace(state, step=8, skipped_steps=2, tokens=8 * 256)
    folder = tmp_path / "checkpoints" / "step-00000008"
    folder.mkdir(parents=True)
    old = dataclasses.asdict(state)
    for key in ("applied_tokens", "schedule_step_tokens", "configuration"):
        del old[key]
    (folder / "state.json").write_text(json.dumps(old))
    assert read_state(folder) == dataclasses.replace(state, configuration={})
    (tmp_path / "config.yaml").write_text("seed: 5\n")
    assert read_state(folder) == dataclasses.replace(state, configuration={"seed": 5})
    assert read_state(folder).applied_tokens == 6 * 256 and TrainState().schedule_step_tokens == 0

"""Spikes are told; steps that are not finite, again and again, take a run back, and then end it."""

import json
import math
from collections import deque
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

from conf import compose
from tests.documented import has_type, keys_and_types, table
from tests.runs import TINY_RUN
from tests.train.plain_engine import PlainEngine
from tests.train.plain_runs import run_plainly, train_losses
from train.callbacks.bad_steps import MINIMUM_HISTORY, WINDOW, BadSteps
from train.callbacks.base import Callback
from train.checkpoints.state import read_state
from train.config import LoggingConfig, NumbersConfig, RunConfig
from train.decisions import CONTINUE, Stop
from train.run import train
from train.run_directory import read_events

SAMPLES = 8
STEPS = 12


@dataclass
class FakeTrainer:
    """What the callback reads of a trainer."""

    factor: float = 4.0
    numbers: NumbersConfig = field(default_factory=NumbersConfig)
    events: list = field(default_factory=list)
    step: int = 0
    last_loss: float = 2.0
    last_gradient_norm: float = 1.0
    kept: int | None = None

    def __post_init__(self) -> None:
        recorded = self.events
        self.events = SimpleNamespace(append=lambda kind, **fields: recorded.append((kind, fields)), recorded=recorded)
        logging = replace(LoggingConfig(), spike_factor=self.factor)
        self.config = RunConfig(logging=logging, numbers=self.numbers)

    @property
    def last_was_applied(self) -> bool:
        return math.isfinite(self.last_gradient_norm)

    @property
    def last_samples(self) -> range:
        return range((self.step - 1) * SAMPLES, self.step * SAMPLES)

    def keep_checkpoint_of(self, step: int | None) -> None:
        self.kept = step

    def take_steps(self, callback: BadSteps, *gradient_norms: float) -> list:
        decisions = []
        for norm in gradient_norms:
            self.step, self.last_gradient_norm = self.step + 1, norm
            decisions.append(callback.on_step_end(self))
        return decisions


def test_a_jump_of_the_gradient_norm_is_an_event():
    trainer, callback = FakeTrainer(), BadSteps()
    trainer.take_steps(callback, *[1.0] * MINIMUM_HISTORY, 4.0, 4.1)
    samples = {"first_sample": (MINIMUM_HISTORY + 1) * SAMPLES, "samples": SAMPLES}
    assert trainer.events.recorded == [
        ("spike", {"step": MINIMUM_HISTORY + 2, "quantity": "grad_norm", "value": 4.1, "median": 1.0, **samples})
    ]


def test_nothing_is_a_spike_before_there_is_a_history():
    trainer, callback = FakeTrainer(), BadSteps()
    trainer.take_steps(callback, *[1.0] * (MINIMUM_HISTORY - 1), 100.0)
    assert trainer.events.recorded == []


def test_steps_that_are_not_finite_neither_alert_nor_count():
    trainer, callback = FakeTrainer(), BadSteps()
    trainer.take_steps(callback, *[1.0] * MINIMUM_HISTORY, float("nan"), float("inf"))
    assert trainer.events.recorded == []
    assert callback.state_dict()["grad_norm"] == [1.0] * MINIMUM_HISTORY


def test_the_median_survives_a_checkpoint():
    trainer, before, after = FakeTrainer(), BadSteps(), BadSteps()
    trainer.take_steps(before, *[1.0] * (WINDOW + 5))
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after._history["loss"] == deque([2.0] * WINDOW)
    trainer.take_steps(after, 9.0)
    assert [fields["quantity"] for _, fields in trainer.events.recorded] == ["grad_norm"]


BAD, GOOD = math.nan, 1.0


def test_so_many_bad_steps_within_the_window_take_the_run_back_before_the_first():
    trainer, callback = FakeTrainer(numbers=NumbersConfig(bad_steps=3, window=5)), BadSteps()
    assert trainer.take_steps(callback, GOOD, BAD, GOOD, BAD, GOOD) == [CONTINUE] * 5
    assert trainer.kept == 1
    (decision,) = trainer.take_steps(callback, BAD)
    assert (decision.step, decision.skip) == (1, None)
    assert "3 of the last 5 steps were bad, from step 1 (samples 8:8) to step 5 (samples 40:8)" in decision.reason


def test_bad_steps_that_are_further_apart_do_not():
    trainer, callback = FakeTrainer(numbers=NumbersConfig(bad_steps=3, window=5)), BadSteps()
    assert trainer.take_steps(callback, BAD, GOOD, BAD, GOOD, GOOD, BAD, GOOD, BAD) == [CONTINUE] * 8
    assert trainer.kept == 5
    trainer.take_steps(callback, *[GOOD] * 5)
    assert trainer.kept is None


def test_no_number_of_bad_steps_does_where_it_is_turned_off():
    trainer, callback = FakeTrainer(numbers=NumbersConfig(bad_steps=None)), BadSteps()
    assert trainer.take_steps(callback, *[BAD] * 200) == [CONTINUE] * 200
    assert trainer.kept is None


@pytest.mark.parametrize("count_spikes", [False, True])
def test_spikes_count_where_the_configuration_says_so(count_spikes):
    numbers = NumbersConfig(bad_steps=3, window=10, count_spikes=count_spikes)
    trainer, callback = FakeTrainer(numbers=numbers), BadSteps()
    decisions = trainer.take_steps(callback, *[GOOD] * MINIMUM_HISTORY, 9.0, BAD, 9.0)
    asked = [decision for decision in decisions if decision != CONTINUE]
    assert [decision.step for decision in asked] == [MINIMUM_HISTORY] * count_spikes


class Poison(Callback):
    """Puts NaN into a gradient in the backward pass of every step that reads one of these samples."""

    def __init__(self, *samples):
        self.samples = set(samples)
        self.rollbacks = []

    def on_step_start(self, trainer):
        first = trainer.state.next_sample
        factor = math.nan if self.samples & set(range(first, first + SAMPLES)) else 1.0
        self.hook = trainer.model.embedding.weight.register_hook(lambda gradient: gradient * factor)

    def on_gradients_ready(self, trainer):
        self.hook.remove()

    def on_rollback(self, trainer, rollback, left):
        self.rollbacks.append((left, rollback.skip))


def poisoned(*steps):
    """A callback that poisons the samples of these steps, counted as without any rollback."""
    return Poison(*(step * SAMPLES for step in steps))


@pytest.fixture(scope="module")
def base(small_corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("bad_steps")
    settings = [f"training.total_steps={STEPS}", "checkpoint.interval=2", "parallel=zero0", "numbers.bad_steps=3"]
    return root, [f"run_root={root}", f"corpus.directory={small_corpus}", *TINY_RUN, *settings]


def events_of(folder, kind):
    return [event for event in read_events(folder) if event["event"] == kind]


def test_a_bad_step_is_skipped_and_the_run_goes_on(base):
    root, overrides = base
    assert run_plainly(["name=skips", *overrides], [poisoned(3, 6)]) == 0
    assert [
        (e["step"], e["first_sample"], e["samples"], e["grad_norm"]) for e in events_of(root / "skips", "skip")
    ] == [
        (3, 3 * SAMPLES, SAMPLES, "nan"),
        (6, 6 * SAMPLES, SAMPLES, "nan"),
    ]
    assert not events_of(root / "skips", "rollback") and events_of(root / "skips", "complete")
    state = read_state(root / "skips" / "checkpoints" / f"step-{STEPS:08d}")
    assert (state.applied_steps, state.skipped_steps) == (STEPS - 2, 2)


@pytest.fixture(scope="module")
def recovered(base):
    """A run with bad steps 5, 6 and 7, all its checkpoints but the newest deleted as soon as may be."""
    root, overrides = base
    poison = poisoned(5, 6, 7)
    kept = ["checkpoint.interval=1", "checkpoint.keep_last=1"]
    assert run_plainly(["name=recovered", *overrides, *kept], [poison]) == 0
    return root / "recovered", poison


def test_several_bad_steps_take_the_run_back_and_what_it_read_since_is_left_out(recovered):
    folder, poison = recovered
    (event,) = events_of(folder, "rollback")
    # Asked for after step 7, followed after step 8. The checkpoint of step 5 was saved before the first bad one.
    assert (event["step"], event["to_step"], event["checkpoint"]) == (9, 5, "step-00000005")
    assert (event["first_sample"], event["samples"]) == (5 * SAMPLES, 4 * SAMPLES)
    assert "3 of the last 100 steps were bad, from step 5 (samples 40:8) to step 7 (samples 56:8)" in event["reason"]
    assert poison.rollbacks == [(9, 4)]
    assert events_of(folder, "complete") and sorted(train_losses(folder)) == list(range(1, STEPS + 1))
    (last,) = (folder / "checkpoints").iterdir()
    state = read_state(last)
    assert (state.step, state.skipped_steps, state.applied_steps) == (STEPS, 0, STEPS)
    assert state.next_sample == (STEPS + 4) * SAMPLES
    assert state.callbacks["BadSteps"]["rollbacks"] == 1


def test_a_bad_loss_alone_makes_a_bad_step(base):
    """Gradients that are finite take part in nothing where the loss is not."""
    root, overrides = base

    class NoLoss(PlainEngine):
        def train_batch(self, micro_batches, valid_tokens):
            loss = super().train_batch(micro_batches, valid_tokens)
            self.steps = getattr(self, "steps", 0) + 1
            return loss * math.inf if self.steps == 3 else loss

    config = compose(RunConfig, "train", ["name=loss", *overrides])
    assert train(config, [], NoLoss) == 0
    (event,) = events_of(root / "loss", "skip")
    assert (event["step"], event["loss"]) == (2, "inf") and math.isfinite(float(event["grad_norm"]))
    assert read_state(root / "loss" / "checkpoints" / f"step-{STEPS:08d}").applied_steps == STEPS - 1


def test_where_going_back_does_not_help_the_run_ends_and_says_what_to_do(base, capfd):
    root, overrides = base
    poison = Poison(*range(5 * SAMPLES, 100 * SAMPLES))
    changes = ["numbers.max_rollbacks=2", "training.max_skipped_steps=100"]
    assert run_plainly(["name=hopeless", *overrides, *changes], [poison]) == 1
    folder = root / "hopeless"
    # Every time to the same checkpoint: those that were saved since are not taken for good ones.
    assert [(e["step"], e["to_step"], e["first_sample"], e["samples"]) for e in events_of(folder, "rollback")] == [
        (9, 4, 4 * SAMPLES, 5 * SAMPLES),
        (8, 4, 4 * SAMPLES, 9 * SAMPLES),
    ]
    (event,) = events_of(folder, "error")
    expected = (
        "3 of the last 100 steps were bad, from step 4 (samples 104:8) to step 6 (samples 120:8); going back 2 times "
        "(numbers.max_rollbacks=2) has not helped"
    )
    assert expected in event["message"] and expected in capfd.readouterr().err
    for words in ("inspect", f"--run {folder} --samples 104:8", "training.skip_samples=[[FIRST, COUNT]]"):
        assert words in event["message"]
    # Started again it has gone back as often as before.
    assert run_plainly(["name=hopeless", *overrides, *changes], [poison]) == 1
    assert len(events_of(folder, "rollback")) == 2


def test_bad_steps_before_a_stop_count_after_the_resume(base):
    root, overrides = base

    class StopAfter(Callback):
        def on_step_end(self, trainer):
            return Stop("a test") if trainer.step == 6 else CONTINUE

    folder = root / "resumed"
    assert run_plainly(["name=resumed", *overrides, "checkpoint.keep_last=1"], [poisoned(5, 6, 7), StopAfter()]) == 0
    # The newest before the first bad step is not deleted, however many are to be kept.
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000004", "step-00000007"]
    assert run_plainly(["name=resumed", *overrides, "checkpoint.keep_last=1"], [poisoned(5, 6, 7)]) == 0
    (event,) = events_of(folder, "rollback")
    assert (event["step"], event["to_step"], event["samples"]) == (9, 4, 5 * SAMPLES)
    assert events_of(folder, "complete")


def test_the_events_are_documented(base, recovered):
    folder, _ = recovered
    for kind in ("skip", "rollback"):
        documented = keys_and_types([row for row in table("training.md", "event") if f"`{kind}`" in row[0]])
        for event in events_of(folder, kind):
            assert event.keys() - {"time", "event"} == documented.keys()
            assert all(has_type(event[key], words) for key, words in documented.items())

"""Samples that a user leaves out are read by no step, and the run goes on exactly, also where it is resumed."""

import pytest

from conf import ConfigError, compose
from tests.documented import has_type, keys_and_types, table
from tests.runs import TINY_RUN
from tests.train.plain_runs import figures, run_plainly, train_losses
from train.callbacks.base import Callback
from train.checkpoints.state import read_state
from train.config import RunConfig
from train.decisions import CONTINUE, Rollback, Stop
from train.run_directory import read_events
from train.validate import validate

SAMPLES, STEPS = 8, 8
# Steps of 8 samples: the first window is in those that begin at 16 and 24, the second in the next but one.
WINDOWS = "training.skip_samples=[[20, 5], [40, 1]]"


class After(Callback):
    """Decides once, after a step; keeps where each step began."""

    def __init__(self, step=0, decision=CONTINUE):
        self.step, self.decision, self.begun = step, decision, []

    def on_step_start(self, trainer):
        self.begun.append(trainer.state.next_sample)

    def on_step_end(self, trainer):
        decision, self.decision = (self.decision, CONTINUE) if trainer.step == self.step else (CONTINUE, self.decision)
        return decision


@pytest.fixture(scope="module")
def base(small_corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("left_out")
    settings = [f"training.total_steps={STEPS}", "checkpoint.interval=2", "checkpoint.keep_last=100", "parallel=zero0"]
    return root, [f"run_root={root}", f"corpus.directory={small_corpus}", *TINY_RUN, *settings]


@pytest.fixture(scope="module")
def whole(base):
    """A run that leaves samples out from its start on, and where its steps began."""
    root, overrides = base
    watching = After()
    assert run_plainly(["name=whole", *overrides, WINDOWS], [watching]) == 0
    return root / "whole", watching.begun


def left_out(folder):
    events = [event for event in read_events(folder) if event["event"] == "left_out"]
    return [(event["step"], event["first_sample"], event["samples"]) for event in events]


def test_no_step_reads_them_and_tokens_count_what_was_trained(whole):
    folder, begun = whole
    assert begun == [0, 8, 32, 48, 56, 64, 72, 80]
    assert left_out(folder) == [(2, 16, 16), (3, 40, 8)]
    state = read_state(folder / "checkpoints" / f"step-{STEPS:08d}")
    assert (state.next_sample, state.tokens, state.applied_steps) == (88, STEPS * SAMPLES * 32, STEPS)


@pytest.mark.parametrize("before", [WINDOWS, "training.skip_samples=[]"], ids=["as before", "set on resume"])
def test_a_resumed_run_computes_what_an_uninterrupted_one_does(base, whole, tmp_path, before):
    _, overrides = base
    overrides = [*overrides, "name=whole", f"run_root={tmp_path}"]
    assert run_plainly([*overrides, before], [After(1, Stop("a test"))]) == 0
    watching = After()
    assert run_plainly([*overrides, WINDOWS], [watching]) == 0
    assert watching.begun == whole[1][2:]
    assert figures(tmp_path / "whole") == figures(whole[0])


def test_a_rollback_leaves_out_the_same_again(base, whole):
    root, overrides = base
    watching = After(5, Rollback(step=2, skip=0))
    assert run_plainly(["name=back", *overrides, WINDOWS], [watching]) == 0
    assert watching.begun[6:] == whole[1][2:]
    assert train_losses(root / "back") == train_losses(whole[0])


def test_what_is_left_out_counts_towards_the_data_that_a_run_needs(base, capfd):
    _, overrides = base
    wide = ["training.skip_samples=[[0, 1000000000]]", "corpus.max_epochs=10", "name=wide"]
    with pytest.raises(ConfigError, match="corpus.max_epochs: the run reads source 'text'"):
        run_plainly([*overrides, *wide])


@pytest.mark.parametrize("window", ["[5]", "[-1, 3]", "[5, 0]", "[1, 2, 3]"])
def test_windows_that_are_none_are_refused(base, window):
    config = compose(RunConfig, "train", ["name=x", *base[1], f"training.skip_samples=[[0, 1], {window}]"])
    (problem,) = validate(config, 1)
    assert problem.startswith("training.skip_samples[1]: needs [first sample, at least 0; how many, at least 1]")


def test_the_event_is_documented(whole):
    documented = keys_and_types([row for row in table("training.md", "event") if "`left_out`" in row[0]])
    for event in (event for event in read_events(whole[0]) if event["event"] == "left_out"):
        assert event.keys() - {"time", "event"} == documented.keys()
        assert all(has_type(event[key], words) for key, words in documented.items())

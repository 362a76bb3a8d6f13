"""A callback takes the run back: weights, moments, counters, data and files go on from an earlier checkpoint."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.documented import has_type, keys_and_types, table
from tests.runs import TINY_RUN, run_script, run_train
from tests.train.plain_runs import figures, run_plainly, train_losses
from train.callbacks.base import Callback
from train.checkpoints.layout import describe_file
from train.checkpoints.state import read_state
from train.decisions import CONTINUE, Continue, Rollback, Stop, agreed
from train.parallel.fragments import MOMENTS
from train.run_directory import read_events

SAMPLES = 8
STEPS = 12


def test_of_all_wishes_one_is_followed():
    assert agreed([]) == CONTINUE == Continue()
    assert agreed([Stop("first"), Stop("second")]) == Stop("first")
    # A stop saves: what it saves should be worth resuming.
    assert agreed([Stop("signal"), Rollback(5, 1)]) == Rollback(5, 1)
    assert agreed([Rollback(5, 1), Rollback(3, 2), Rollback(8, 0)]) == Rollback(3, 2)


class AskOnce(Callback):
    """Wishes for `decision` once, after step `after`; keeps what the engine holds when the run has gone back."""

    def __init__(self, after, *decisions):
        self.after = after
        self.decisions = list(decisions)
        self.seen = {}

    def on_step_end(self, trainer):
        if trainer.step != self.after or not self.decisions:
            return CONTINUE
        for decision in self.decisions[1:]:
            trainer.wish(decision)
        decision, self.decisions = self.decisions[0], []
        return decision

    def on_rollback(self, trainer, rollback, left):
        self.seen = {
            "rollback": rollback,
            "left": left,
            "state": vars(trainer.state).copy(),
            "weights": {f.name: f.master.clone() for f in trainer.engine.fragments},
            **{key: {f.name: f.moment(key).clone() for f in trainer.engine.fragments} for key in MOMENTS},
        }


@pytest.fixture(scope="module")
def base(small_corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("rollback")
    settings = [f"training.total_steps={STEPS}", "checkpoint.interval=2", "checkpoint.keep_last=100", "parallel=zero0"]
    settings += ["logging.monitor_interval=3", "evaluation.interval=6"]
    return root, [f"run_root={root}", f"corpus.directory={small_corpus}", *TINY_RUN, *settings]


@pytest.fixture(scope="module")
def rolled_back(base):
    """The folder of a run that went back from step 8 to step 4 and left out the samples of two steps, and what its
    callback saw."""
    root, overrides = base
    callback = AskOnce(7, Rollback(step=5, skip=2, reason="a test"))
    assert run_plainly(["name=back", *overrides], [callback]) == 0
    return root / "back", callback.seen


def events_of(folder, kind):
    return [event for event in read_events(folder) if event["event"] == kind]


def test_weights_moments_and_counters_are_those_of_the_checkpoint(rolled_back):
    folder, seen = rolled_back
    checkpoint = folder / "checkpoints" / "step-00000004"
    for part in ("weights", *MOMENTS):
        saved = load_file(checkpoint / part / "weights-00000.safetensors")
        assert {f"{name}@0" for name in seen[part]} == saved.keys()
        assert all(torch.equal(saved[f"{name}@0"], tensor) for name, tensor in seen[part].items())
    expected = vars(read_state(checkpoint))
    assert expected["next_sample"] == 4 * SAMPLES
    assert seen["state"] == {**expected, "next_sample": 6 * SAMPLES}


def test_the_event_says_from_where_to_where_and_which_samples_are_left_out(rolled_back):
    folder, _ = rolled_back
    (event,) = events_of(folder, "rollback")
    event.pop("time")
    assert event == {
        "event": "rollback",
        "step": 8,
        "to_step": 4,
        "checkpoint": "step-00000004",
        "first_sample": 4 * SAMPLES,
        "samples": 2 * SAMPLES,
        "reason": "a test",
    }


def test_metrics_have_every_step_once(rolled_back):
    folder, _ = rolled_back
    assert sorted(train_losses(folder)) == [line[0] for line in figures(folder) if len(line) == 4] == list(range(1, 13))
    assert [line[0] for line in figures(folder) if len(line) == 3] == [6, 12]


def test_what_was_given_up_cannot_be_resumed_and_what_is_left_out_stays_out(rolled_back):
    folder, _ = rolled_back
    steps = {path.name: read_state(path) for path in (folder / "checkpoints").iterdir()}
    # The first step after going back is saved: a start from the checkpoint of step 4 would read the samples again.
    assert sorted(steps) == [f"step-{step:08d}" for step in (2, 4, 5, 6, 8, 10, 12)]
    for name in ("step-00000005", "step-00000006", "step-00000012"):
        state = steps[name]
        assert state.next_sample == (state.step + 2) * SAMPLES
        assert state.tokens == state.step * SAMPLES * 32 and state.applied_steps == state.step


def test_the_run_goes_on_as_one_that_was_resumed_there(base, rolled_back):
    """Bitwise: a run of which only the checkpoint of step 4 is left, with its position moved by two steps."""
    root, overrides = base
    folder, _ = rolled_back
    copy = root / "resumed"
    shutil.copytree(folder, copy)
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("name: back", "name: resumed"))
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > 4:
            shutil.rmtree(path)
    state = copy / "checkpoints" / "step-00000004" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "next_sample": 6 * SAMPLES}))
    marker = json.loads((state.parent / "complete.json").read_text())
    marker["files"]["state.json"] = describe_file(state)
    (state.parent / "complete.json").write_text(json.dumps(marker))
    assert run_plainly(["name=resumed", *overrides]) == 0
    assert figures(copy) == figures(folder)


def test_without_a_checkpoint_the_run_goes_back_to_its_beginning(base):
    root, overrides = base
    callback = AskOnce(3, Rollback(step=0, skip=1))
    assert run_plainly(["name=beginning", *overrides, "checkpoint.interval=0"], [callback]) == 0
    assert run_plainly(["name=plain", *overrides, "checkpoint.interval=0"]) == 0
    (event,) = events_of(root / "beginning", "rollback")
    assert (event["to_step"], event["checkpoint"], event["first_sample"]) == (0, None, 0)
    assert callback.seen["state"]["next_sample"] == SAMPLES and callback.seen["state"]["applied_steps"] == 0
    assert all(not tensor.any() for key in MOMENTS for tensor in callback.seen[key].values())
    # Other data from the first step on.
    assert train_losses(root / "beginning")[1] != train_losses(root / "plain")[1]
    assert len(train_losses(root / "beginning")) == STEPS


def test_a_rollback_that_the_last_step_asks_for_is_followed(base):
    root, overrides = base
    assert run_plainly(["name=last", *overrides], [AskOnce(STEPS, Rollback(step=10, skip=1))]) == 0
    (event,) = events_of(root / "last", "rollback")
    assert (event["step"], event["to_step"]) == (STEPS, 10)
    assert events_of(root / "last", "complete")[0]["step"] == STEPS
    assert read_state(root / "last" / "checkpoints" / "step-00000012").next_sample == 13 * SAMPLES


def test_a_stop_is_still_wished_for_after_a_rollback(base):
    root, overrides = base
    callback = AskOnce(5, Stop("the user"), Rollback(step=4, skip=1))
    assert run_plainly(["name=both", *overrides], [callback]) == 0
    assert [event["event"] for event in read_events(root / "both") if event["event"] in ("rollback", "stop")] == [
        "rollback",
        "stop",
    ]
    (stop,) = events_of(root / "both", "stop")
    assert (stop["step"], stop["reason"]) == (5, "the user")
    assert read_state(root / "both" / "checkpoints" / "step-00000005").next_sample == 6 * SAMPLES


def test_what_is_no_decision_names_itself(base):
    _, overrides = base
    with pytest.raises(TypeError, match="decides on Continue, Stop or Rollback, not on 'stop'"):
        run_plainly(["name=odd", *overrides], [AskOnce(2, "stop")])


ONE_RANK_ASKS = """
import sys

from conf import compose
from tests.train.test_rollback import AskOnce
from train.__main__ import end_process
from train import train
from train.config import RunConfig
from train.decisions import Rollback


class AskOnRank1(AskOnce):
    def on_step_end(self, trainer):
        decision = super().on_step_end(trainer)
        return decision if trainer.mesh.rank == 1 else None


asking = AskOnRank1(7, Rollback(step=5, skip=2, reason="a test"))
end_process(train(compose(RunConfig, "train", sys.argv[1:]), [asking]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_one_rank_asks_and_all_go_back(base, rolled_back, tmp_path, stage):
    _, overrides = base
    (tmp_path / "asks.py").write_text(ONE_RANK_ASKS)
    changes = [f"parallel=zero{stage}", f"run_root={tmp_path}", "name=back"]
    done = run_script(tmp_path / "asks.py", [*overrides, *changes], processes=2)
    assert done.returncode == 0, done.stderr
    (event,) = events_of(tmp_path / "back", "rollback")
    assert (event["step"], event["to_step"], event["first_sample"]) == (8, 4, 4 * SAMPLES)
    assert read_state(tmp_path / "back" / "checkpoints" / "step-00000012").next_sample == 14 * SAMPLES
    expected, got = train_losses(rolled_back[0]), train_losses(tmp_path / "back")
    assert list(got) == list(range(1, STEPS + 1))
    assert max(abs(expected[step] - got[step]) for step in expected) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_the_engine_of_a_rolled_back_run_is_that_of_a_resumed_one(base, tmp_path, stage):
    """Bitwise, with DeepSpeed: what the given-up step left in its buffers takes no part."""
    _, overrides = base
    (tmp_path / "asks.py").write_text(ONE_RANK_ASKS.replace("trainer.mesh.rank == 1", "True"))
    changes = [f"parallel=zero{stage}", f"run_root={tmp_path}", "name=back", "precision=bf16"]
    done = run_script(tmp_path / "asks.py", [*overrides, *changes])
    assert done.returncode == 0, done.stderr
    expected = figures(tmp_path / "back")
    # The checkpoint of step 5, the first after going back, has the moved position.
    for path in (tmp_path / "back" / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > 5:
            shutil.rmtree(path)
    assert run_train([*overrides, *changes]).returncode == 0
    assert figures(tmp_path / "back") == expected


def test_the_event_is_documented(rolled_back):
    (event,) = events_of(rolled_back[0], "rollback")
    documented = keys_and_types([row for row in table("training.md", "event") if "`rollback`" in row[0]])
    assert event.keys() - {"time", "event"} == documented.keys()
    for key, words in documented.items():
        assert has_type(event[key], words), f"{key}: {event[key]!r} is not {words}"

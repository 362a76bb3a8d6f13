"""Wrong numbers on one of two processes, under every engine: real processes over gloo."""

import json
import os

import pytest

from tests.documented import has_type, keys_and_types, table
from tests.runs import ROOT, TINY_RUN, run_script
from tests.train.plain_runs import train_losses
from train.checkpoints.state import read_state
from train.run_directory import read_events

SCRIPT = ROOT / "tests" / "train" / "parallel" / "troubled_numbers.py"
SAMPLES, STEPS = 8, 10
ENGINES = {
    "zero0": ["parallel=zero0"],
    "zero1": ["parallel=zero1"],
    "zero1_bf16": ["parallel=zero1", "precision=bf16"],
    "zero2": ["parallel=zero2"],
    "zero3": ["parallel=zero3"],
    "pipeline": ["parallel=zero0", "parallel.pipeline=2"],
    "pipeline_zero1": ["parallel=zero1", "parallel.pipeline=2"],
}
SETTINGS = ["model.tie_embeddings=true", f"training.total_steps={STEPS}", "checkpoint.interval=2"]
SETTINGS += ["numbers.bad_steps=3", "numbers.window=4"]


def start(root, corpus, runs, processes=2):
    """Train {name: (overrides, troubles)}, one after the other."""
    base = [f"run_root={root}", f"corpus.directory={corpus}", *TINY_RUN, *SETTINGS]
    arguments = [[[*base, f"name={name}", *overrides], troubles] for name, (overrides, troubles) in runs.items()]
    return run_script(SCRIPT, [json.dumps(arguments)], processes)


def events_of(folder, kind):
    return [event for event in read_events(folder) if event["event"] == kind]


@pytest.fixture(scope="module")
def troubled(small_corpus, tmp_path_factory):
    """Under every engine, a run with NaN in one rank's gradient at step 1, and from step 4 to step 6; last, one in
    which a bit of a rank's weights is flipped after step 3."""
    root = tmp_path_factory.mktemp("troubled")
    troubles = {"poison": [1, 4, 5, 6], "compare": 3}
    runs = {name: (overrides, troubles) for name, overrides in ENGINES.items()}
    runs["flipped"] = (["parallel=zero0", "numbers.compare_interval=4"], {"flip": 3})
    done = start(root, small_corpus, runs)
    return root, done


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ENGINES)
def test_nan_on_one_rank_is_skipped_on_all_and_several_take_the_run_back(troubled, name):
    folder, done = troubled[0] / name, troubled[1]
    skips = [(event["step"], event["first_sample"], event["samples"]) for event in events_of(folder, "skip")]
    assert skips == [(step, step * SAMPLES, SAMPLES) for step in (1, 4, 5, 6)], done.stderr
    (event,) = events_of(folder, "rollback")
    assert (event["step"], event["to_step"]) == (8, 4)
    assert (event["first_sample"], event["samples"]) == (4 * SAMPLES, 4 * SAMPLES)
    assert events_of(folder, "complete") and not events_of(folder, "error")
    state = read_state(folder / "checkpoints" / f"step-{STEPS:08d}")
    assert (state.applied_steps, state.skipped_steps, state.next_sample) == (STEPS - 1, 1, (STEPS + 4) * SAMPLES)
    # Numbers are the same under every engine, those after a skipped step and a rollback among them.
    expected, found = train_losses(troubled[0] / "zero0"), train_losses(folder)
    tolerance = 2e-2 if name == "zero1_bf16" else 1e-5
    assert list(found) == list(range(1, STEPS + 1)) == list(expected)
    # The loss of a poisoned step is that of weights which no NaN has reached.
    assert max(abs(expected[step] - found[step]) for step in expected) <= tolerance


@pytest.mark.parametrize("name", ENGINES)
def test_a_flipped_bit_in_weights_of_one_rank_is_found(troubled, name):
    found = json.loads((troubled[0] / name / "comparisons.json").read_text())
    assert found["none"] == found["after"] == []
    # Of two copies either may be right.
    both = [{"rank": rank, "names": ["embedding.weight"], "is_certain": False} for rank in (0, 1)]
    part = [{"rank": 1, "names": [found["name_of_part"]], "is_certain": True}]
    if name in ("zero0", "pipeline"):
        # There are no fp32 weights beside those.
        part = [{"rank": rank, "names": [found["name_of_part"]], "is_certain": False} for rank in (0, 1)]
    assert found["whole"] == both
    # A stage that has no replica, and no other weights, has nothing to compare with.
    assert found["part"] == ([] if name == "pipeline" else part)


def test_a_run_with_a_flipped_bit_ends_within_the_interval_and_names_the_ranks(troubled):
    root, done = troubled
    assert done.returncode == 1
    folder = root / "flipped"
    events = events_of(folder, "deviation")
    (name,) = {name for event in events for name in event["first_parameters"]}
    assert [(e["rank"], e["step"], e["what"], e["certain"], e["parameters"]) for e in events] == [
        (0, 4, "weights", False, 1),
        (1, 4, "weights", False, 1),
    ]
    (error,) = events_of(folder, "error")
    host = os.uname().nodename
    for words in (
        f"perhaps rank 0 on {host} ({name}); perhaps rank 1 on {host} ({name})",
        "All were equal after step 0 (numbers.compare_interval=4)",
        "remove step-00000002, saved since, and start the same command again",
    ):
        assert words in error["message"]
    # What was found is not saved.
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.layouts
@pytest.mark.parametrize("name", ENGINES)
def test_nan_that_stays_ends_the_run_after_so_many_rollbacks(small_corpus, tmp_path, name):
    settings = [*ENGINES[name], "numbers.max_rollbacks=1", "training.max_skipped_steps=100"]
    done = start(tmp_path, small_corpus, {name: (settings, {"poison": list(range(4, 100))})})
    assert done.returncode == 1, done.stderr
    (event,) = events_of(tmp_path / name, "rollback")
    assert (event["step"], event["to_step"], event["samples"]) == (8, 4, 4 * SAMPLES)
    (error,) = events_of(tmp_path / name, "error")
    assert "3 of the last 4 steps were bad, from step 4 (samples 64:8) to step 6 (samples 80:8)" in error["message"]
    assert "going back once (numbers.max_rollbacks=1) has not helped" in error["message"]
    assert "Traceback" not in done.stderr


@pytest.mark.layouts
@pytest.mark.parametrize("name", [name for name in ENGINES if name != "pipeline"])
def test_every_engine_ends_a_run_with_a_flipped_bit(small_corpus, tmp_path, name):
    """A stage of a pipeline without replicas and fp32 weights has nothing to compare with."""
    settings = [*ENGINES[name], "numbers.compare_interval=4"]
    done = start(tmp_path, small_corpus, {name: (settings, {"flip": 3})})
    assert done.returncode == 1, done.stderr
    certain = name != "zero0"
    found = [(event["rank"], event["step"], event["certain"]) for event in events_of(tmp_path / name, "deviation")]
    assert found == ([(1, 4, True)] if certain else [(0, 4, False), (1, 4, False)])


@pytest.mark.layouts
def test_of_three_replicas_the_one_that_differs_is_named(small_corpus, tmp_path):
    settings = ["parallel=zero0", "numbers.compare_interval=4", "training.global_batch_size=6"]
    done = start(tmp_path, small_corpus, {"run": (settings, {"flip": 3})}, processes=3)
    assert done.returncode == 1, done.stderr
    (event,) = events_of(tmp_path / "run", "deviation")
    assert (event["rank"], event["step"], event["certain"]) == (1, 4, True)
    assert "not what all processes should hold: rank 1 on" in events_of(tmp_path / "run", "error")[0]["message"]


@pytest.mark.layouts
@pytest.mark.parametrize("asked", [True, False])
def test_gradients_are_compared_on_demand(small_corpus, tmp_path, asked):
    settings = ["parallel=zero0", "numbers.compare_interval=4", f"numbers.compare_gradients={str(asked).lower()}"]
    done = start(tmp_path, small_corpus, {"run": (settings, {"flip_gradient": 4})})
    assert done.returncode == 1, done.stderr
    # What the gradient was, the weights are, a moment later.
    events = events_of(tmp_path / "run", "deviation")
    assert {event["what"] for event in events} == {"gradients" if asked else "weights"}
    assert [(event["rank"], event["step"]) for event in events] == [(0, 3 if asked else 4), (1, 3 if asked else 4)]


def test_the_event_is_documented(troubled):
    documented = keys_and_types([row for row in table("training.md", "event") if "`deviation`" in row[0]])
    for event in events_of(troubled[0] / "flipped", "deviation"):
        assert event.keys() - {"time", "event"} == documented.keys()
        assert all(has_type(event[key], words) for key, words in documented.items())

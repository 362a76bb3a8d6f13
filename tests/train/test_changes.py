"""A run that goes on under another configuration: what it says and keeps, what it refuses, how long it then is."""

import dataclasses
import json
import random
import re
import shutil

import pytest
import yaml

from conf import ConfigError
from data_pipeline.__main__ import main as data_pipeline
from tests.runs import TINY_RUN
from tests.train.plain_runs import run_plainly
from train.callbacks.base import Callback
from train.changes import RateChange, describe_resume, refused_changes_of_data
from train.checkpoints.layout import describe_file
from train.checkpoints.state import read_state
from train.config import RunConfig
from train.decisions import Stop
from train.length import begin
from train.run_directory import read_events
from train.stored_configuration import differences, written

SMALL = ["checkpoint.interval=0", "schedule.warmup=2"]
WITHOUT_EVALUATION = [*(item for item in TINY_RUN if not item.startswith("evaluation.")), "evaluation=none"]


class StopAfter(Callback):
    def __init__(self, step):
        self.step = step

    def on_step_start(self, trainer):
        if trainer.step == self.step - 1:
            trainer.wish(Stop("a test"))


@pytest.fixture(scope="module")
def started(small_corpus, tmp_path_factory):
    """The folder of runs in which "run", of 4,096 tokens, was stopped after 6 of its 16 steps of 256."""
    root = tmp_path_factory.mktemp("runs")
    corpus = f"corpus.directory={small_corpus}"
    overrides = ["name=run", f"run_root={root}", corpus, *WITHOUT_EVALUATION, *SMALL, "training.total_tokens=4096"]
    assert run_plainly(overrides, [StopAfter(6)]) == 0
    return root, overrides


@pytest.fixture
def stopped(started, tmp_path):
    """A copy of it: its folder, and its overrides."""
    root, overrides = started
    shutil.copytree(root / "run", tmp_path / "run")
    return tmp_path / "run", [*overrides, f"run_root={tmp_path}"]


def last_event(folder, kind):
    return [event for event in read_events(folder) if event["event"] == kind][-1]


def rates(folder):
    """Tokens before each logged step -> its learning rate."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    before = [0, *(line["tokens"] for line in lines)]
    return dict(zip(before, [line["learning_rate"] for line in lines], strict=False))


def rewrite_state(folder, change):
    """Let `change` alter the state of the only checkpoint."""
    (checkpoint,) = (folder / "checkpoints").iterdir()
    path, marker = checkpoint / "state.json", checkpoint / "complete.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    content = json.loads(marker.read_text())
    content["files"]["state.json"] = describe_file(path)
    marker.write_text(json.dumps(content))


def test_a_larger_batch_on_resume_changes_neither_the_tokens_nor_the_curve(started, stopped, tmp_path, capsys):
    folder, overrides = stopped
    shutil.copytree(folder, tmp_path / "steady")
    (tmp_path / "steady" / "config.yaml").write_text(
        (folder / "config.yaml").read_text().replace("name: run", "name: steady")
    )
    assert run_plainly([*overrides, "name=steady"]) == 0
    assert run_plainly([*overrides, "training.global_batch_size=16"]) == 0
    curve, found = rates(tmp_path / "steady"), rates(folder)
    assert list(found) == [*range(0, 6 * 256, 256), *range(6 * 256, 4096, 512)] and len(curve) == 16
    assert found == {tokens: curve[tokens] for tokens in found}
    assert read_state(folder / "checkpoints" / "step-00000011").tokens == 4096
    resume = last_event(folder, "resume")
    assert resume["changes"] == {"training.global_batch_size": [8, 16]}
    assert resume["learning_rate"] == resume["learning_rate_before"] == curve[6 * 256]
    said = capsys.readouterr().err
    assert "left       5 steps, 2,560 tokens, of 11 steps, 4,096 tokens (" in said
    assert "data       80 samples left of 128, order" in said
    assert "Resuming 'run' from step-00000006: 6 of 11 steps" in said
    assert "changed    training.global_batch_size: 8 -> 16\n" in said and "WARNING" not in said
    assert run_plainly([*overrides, "training.global_batch_size=16"]) == 0
    said = capsys.readouterr().err
    assert "The run 'run' is complete: 11 steps, 4,096 tokens in " in said
    assert f"{folder}. To go on, make it longer, such as by training.total_tokens=8192.\n" in said


def test_a_checkpoint_of_0_2_0_goes_on_in_tokens_bit_for_bit(stopped, tmp_path):
    folder, overrides = stopped
    shutil.copytree(folder, tmp_path / "new" / "run")

    def as_in_0_2_0(state):
        for key in ("applied_tokens", "schedule_step_tokens", "configuration"):
            del state[key]

    rewrite_state(folder, as_in_0_2_0)
    shutil.rmtree(folder / "configurations")
    first = (folder / "config.yaml").read_text()
    assert run_plainly(overrides) == 0
    assert run_plainly([*overrides, f"run_root={tmp_path / 'new'}"]) == 0
    kept = ("step", "loss", "grad_norm", "learning_rate", "tokens")
    old, new = (
        [[json.loads(line).get(key) for key in kept] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (folder, tmp_path / "new" / "run")
    )
    assert old == new and len(old) == 17
    # What it was started with is kept.
    assert (folder / "configurations" / "0001.yaml").read_text() == first
    assert last_event(folder, "resume")["configuration"] == "configurations/0002.yaml"


def test_what_changed_is_printed_and_recorded_and_every_configuration_kept(stopped, capsys):
    folder, overrides = stopped
    changed = ["optimizer.learning_rate=2e-2", "optimizer.weight_decay=0.2", "logging.wandb.tags=[a]"]
    assert run_plainly([*overrides, *changed, "checkpoint.keep_last=1"], [StopAfter(7)]) == 0
    event = last_event(folder, "resume")
    assert event["changes"] == {
        "optimizer.learning_rate": [0.01, 0.02],
        "optimizer.weight_decay": [0.1, 0.2],
        "checkpoint.keep_last": [3, 1],
        "logging.wandb.tags": [[], ["a"]],
    }
    assert event["learning_rate"] == 2 * event["learning_rate_before"]
    said = capsys.readouterr().err
    assert "changed    optimizer.learning_rate: 0.01 -> 0.02\n" in said
    assert "changed    logging.wandb.tags: [] -> [a]\n" in said
    shown = re.search(
        r"WARNING    the learning rate rises at step 6: from (\S+), (\S+) of its peak, to (\S+), (.*)\.", said
    )
    assert float(shown[3]) == pytest.approx(2 * float(shown[1]), rel=0.01) and shown[2] == shown[4]
    kept = {path.name: yaml.safe_load(path.read_text()) for path in (folder / "configurations").iterdir()}
    assert {name: config["optimizer"]["learning_rate"] for name, config in kept.items()} == {
        "0001.yaml": 0.01,
        "0002.yaml": 0.02,
    }
    assert event["configuration"] == "configurations/0002.yaml"
    assert (folder / "config.yaml").read_text() == (folder / "configurations" / "0002.yaml").read_text()
    # Back to what it was: a change again, by what trained the checkpoint and not by what stands in a file.
    assert run_plainly(overrides, [StopAfter(8)]) == 0
    assert last_event(folder, "resume")["changes"]["optimizer.learning_rate"] == [0.02, 0.01]
    assert "WARNING" not in capsys.readouterr().err


def test_an_extended_decay_is_warned_of_with_both_rates(stopped, capsys):
    folder, overrides = stopped
    assert run_plainly(overrides) == 0
    capsys.readouterr()
    assert run_plainly([*overrides, "training.total_tokens=6144"], [StopAfter(17)]) == 0
    said = capsys.readouterr().err
    event = last_event(folder, "resume")
    assert (event["learning_rate_before"], event["step"]) == (pytest.approx(1e-3), 16)
    assert 2e-3 < event["learning_rate"] < 5e-3
    assert f"rate       0.001 -> {event['learning_rate']:.3g} for the step after step 16" in said
    assert "WARNING    the learning rate rises at step 16: from 0.001, 10% of its peak, to 0.0" in said


@pytest.mark.parametrize(
    "rate, said",
    [
        (RateChange(4e-5, 1.1e-4, 0.1, 0.275), "rises at step 60: from 4e-05, 10% of its peak, to 0.00011, 28%."),
        (RateChange(4e-5, 2e-5, 0.1, 0.2), "is set back towards its peak at step 60: from 4e-05, 10% of its peak"),
        (RateChange(4e-4, 8e-4, 1.0, 1.0), "rises at step 60: from 0.0004, 100% of its peak, to 0.0008, 100%."),
        (RateChange(4e-4, 1e-4, 1.0, 0.25), None),
        (RateChange(4e-4, 4e-4, 1.0, 1.0), None),
        (None, None),
    ],
)
def test_a_warning_where_the_rate_rises_or_a_decay_begins_again(rate, said):
    lines = "\n".join(describe_resume({}, rate, 60))
    assert ("WARNING" in lines) == (said is not None) and (said or "") in lines
    assert ("rate  " in lines) == (rate is not None and rate.before != rate.now)


def test_a_corpus_is_known_by_what_it_holds_and_not_by_its_name(stopped, small_corpus, tmp_path, capsys, monkeypatch):
    folder, overrides = stopped
    shutil.copytree(small_corpus, tmp_path / "moved")
    monkeypatch.chdir(small_corpus.parent)
    assert run_plainly([*overrides, f"corpus.directory={small_corpus.name}"], [StopAfter(7)]) == 0
    assert last_event(folder, "resume")["changes"] == {}
    monkeypatch.chdir(tmp_path)
    assert run_plainly([*overrides, "corpus.directory=moved", "run_root=."], [StopAfter(8)]) == 0
    assert last_event(folder, "resume")["changes"] == {"corpus.directory": [small_corpus.name, "moved"]}
    assert not [event for event in read_events(folder) if event["event"] == "data_changed"]


def test_other_words_for_the_same_data_are_no_change_of_them():
    config = RunConfig(name="run")
    state = dataclasses.replace(begin(config, {"order": "a"}), step=1)
    weighted = dataclasses.replace(config, corpus=dataclasses.replace(config.corpus, weights={"text": 2.0}))
    assert refused_changes_of_data(weighted, state, {"order": "a"}) == []
    (problem,) = refused_changes_of_data(weighted, state, {"order": "b", "mixture": "b"})
    assert problem.startswith("corpus.weights: {text: 2.0} gives other data than null gave")


def test_other_data_are_refused_with_the_keys_and_nothing_is_overwritten(stopped, tmp_path, capsys):
    folder, overrides = stopped
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ConfigError) as refused:
        run_plainly([*overrides, "training.sequence_length=64", "corpus.window_shards=1", "seed=4"])
    seed, length, windows = refused.value.problems
    assert seed.startswith("seed: ") and "was started with another value (0, now 4)" in seed and "or set seed=0" in seed
    assert length.startswith("training.sequence_length: 64 gives other data than 32 gave, so the run's position in its")
    assert windows.startswith("corpus.window_shards: 1 gives other data than null gave, ")
    assert windows.endswith("or give the reason for the change in corpus.allow_changed_data='...'")
    text = tmp_path / "text"
    text.mkdir()
    for number in range(8):
        words = ["".join(random.choices("qrstuvwxyz", k=random.randint(2, 6))) for _ in range(500)]
        (text / f"{number}.txt").write_text(" ".join(words))
    settings = ["data=text", f"data.path={text}", "tokenizer=sentencepiece_4k", "tokenizer.vocab_size=320"]
    assert data_pipeline(["prepare", *settings, f"output={tmp_path / 'other'}"]) == 0
    other = [*overrides, f"corpus.directory={tmp_path / 'other'}", "corpus.max_epochs=1e6"]
    with pytest.raises(
        ConfigError, match=r"corpus\.directory: \S+/other gives other data than \S+/corpus gave \(corpus: \w{12} then"
    ):
        run_plainly(other)
    assert (folder / "config.yaml").read_text() == before and len(list((folder / "configurations").iterdir())) == 1
    capsys.readouterr()
    assert run_plainly([*other, "corpus.allow_changed_data=a test"], [StopAfter(7)]) == 0
    assert "WARNING    the data are others than before (corpus: " in capsys.readouterr().err
    # Text that the run generates is said in the tokenizer of what it is trained on now.
    copy, now = (path / "tokenizer" / "tokenizer.model" for path in (folder, tmp_path / "other"))
    assert copy.read_bytes() == now.read_bytes()


def test_a_longer_sequence_with_a_reason_keeps_the_budget(stopped):
    folder, overrides = stopped
    longer = ["training.sequence_length=64", "corpus.allow_changed_data=a longer context"]
    assert run_plainly([*overrides, *longer]) == 0
    newest = max((folder / "checkpoints").iterdir())
    assert (read_state(newest).tokens, newest.name) == (4096, "step-00000011")
    assert last_event(folder, "data_changed")["changes"]["sequence_length"] == [32, 64]


def test_differences_name_keys_and_know_places(tmp_path, monkeypatch):
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    before = {"x": 1, "s": {"directory": "a", "path": str(tmp_path / "b"), "name": "a"}, "t": None}
    now = {"x": 2, "s": {"directory": str(tmp_path / "a"), "path": "a", "name": str(tmp_path / "a")}, "t": {"y": 1}}
    assert differences(before, now) == {"x": [1, 2], "s.name": ["a", str(tmp_path / "a")], "t": [None, {"y": 1}]}
    shown = [written(value) for value in (None, True, 0.5, "a", [1, None], {"a": {"b": False}})]
    assert shown == ["null", "true", "0.5", "a", "[1, null]", "{a: {b: false}}"]
    assert len(written("x" * 500)) == 200

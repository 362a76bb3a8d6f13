"""A run that begins from weights of another, or as a branch of it, and what is refused before it does."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from conf import ConfigError
from model.huggingface import export_huggingface
from model.loading import open_stored
from tests.documented import has_type, keys_and_types, quoted, table
from tests.model_tools.small_models import CONFIGS, random_model
from tests.runs import TINY_RUN, run_train
from tests.train.plain_runs import figures, run_plainly, train_losses
from train.callbacks.base import Callback
from train.callbacks.wandb_logger import WandbLogger
from train.checkpoints.layout import MARKER, describe_file
from train.decisions import CONTINUE, Rollback
from train.origin import read_ancestry
from train.parallel.fragments import MOMENTS
from train.run_directory import read_events

STEPS = 8
OLDER = Path(__file__).resolve().parents[1] / "fixtures" / "0.2.0"


@pytest.fixture(scope="module")
def base(small_corpus, tmp_path_factory):
    """A folder of runs, and what all of them are started with."""
    root = tmp_path_factory.mktemp("origin")
    settings = [f"training.total_steps={STEPS}", "checkpoint.interval=2", "checkpoint.keep_last=100", "parallel=zero0"]
    settings += ["schedule=constant"]
    return root, [f"run_root={root}", f"corpus.directory={small_corpus}", *TINY_RUN, *settings]


@pytest.fixture(scope="module")
def parent(base):
    root, overrides = base
    assert run_plainly(["name=parent", *overrides]) == 0
    return root / "parent"


class Watch(Callback):
    """Keeps what the engine holds when the run begins."""

    def on_run_start(self, trainer):
        self.state = dataclasses.replace(trainer.state)
        self.weights = {f.name: f.master.clone().view(f.shape) for f in trainer.engine.fragments}
        self.moments = [f.moment(key).clone() for f in trainer.engine.fragments for key in MOMENTS]


def events_of(folder, kind):
    return [event for event in read_events(folder) if event["event"] == kind]


def refusal(overrides):
    with pytest.raises(ConfigError) as refused:
        run_plainly(overrides)
    return refused.value.problems


def test_a_branch_goes_on_bit_for_bit_and_needs_its_parent_no_more(base, parent, tmp_path):
    root, overrides = base
    shutil.copytree(parent, tmp_path / "parent")
    branch = ["name=branch", f"resume_from={tmp_path / 'parent'}@4", *overrides]
    assert run_plainly(branch) == 0
    assert figures(root / "branch") == [line for line in figures(parent) if line[0] > 4]

    (event,) = events_of(root / "branch", "branch")
    assert event == read_ancestry(root / "branch") | {"time": event["time"]}
    assert event["source"] == str(tmp_path / "parent" / "checkpoints" / "step-00000004")
    assert (event["run"], event["step"], event["attempt"]) == (str(tmp_path / "parent"), 4, 1)
    assert re.fullmatch("[0-9a-f]{32}", event["xxh3_128"])

    # Pruned or deleted, the parent takes nothing from the branch; the same command resumes it.
    for later in (6, 8):
        shutil.rmtree(root / "branch" / "checkpoints" / f"step-{later:08d}")
    shutil.rmtree(tmp_path / "parent")
    assert run_plainly(branch) == 0
    assert figures(root / "branch") == [line for line in figures(parent) if line[0] > 4]
    assert [event["step"] for event in events_of(root / "branch", "resume")] == [4, 4]
    assert len(events_of(root / "branch", "branch")) == 1


def test_a_branch_tells_what_it_changes(base, parent, capsys):
    root, overrides = base
    changed = ["optimizer.learning_rate=5e-3", "training.global_batch_size=4", "training.total_steps=6"]
    assert run_plainly(["name=changed", f"resume_from={parent}@4", *overrides, *changed]) == 0
    assert "changed    optimizer.learning_rate: 0.01 -> 0.005" in capsys.readouterr().err
    (event,) = events_of(root / "changed", "resume")
    assert set(event["changes"]) == {
        "optimizer.learning_rate",
        "training.global_batch_size",
        "training.total_steps",
    }
    assert (event["step"], event["next_sample"], event["learning_rate"]) == (4, 32, 0.005)
    # Nothing of that is the parent's.
    assert train_losses(parent).keys() == set(range(1, STEPS + 1))


def test_a_branch_of_an_older_versions_run_tells_what_it_changes(base, parent, tmp_path):
    """Up to 0.2.0 the configuration lies beside the checkpoints, not in them."""
    root, overrides = base
    shutil.copytree(parent, tmp_path / "parent")
    checkpoint = tmp_path / "parent" / "checkpoints" / "step-00000004"
    state, marker = json.loads((checkpoint / "state.json").read_text()), json.loads((checkpoint / MARKER).read_text())
    for key in ("configuration", "applied_tokens", "schedule_step_tokens"):
        del state[key]
    (checkpoint / "state.json").write_text(json.dumps(state))
    marker["files"]["state.json"] = describe_file(checkpoint / "state.json")
    (checkpoint / MARKER).write_text(json.dumps(marker))
    branch = ["name=of_older", f"resume_from={tmp_path / 'parent'}@4", *overrides, "optimizer.weight_decay=0.3"]
    assert run_plainly([*branch, "training.total_steps=5"]) == 0
    (event,) = events_of(root / "of_older", "resume")
    assert set(event["changes"]) == {"optimizer.weight_decay", "training.total_steps"}


def test_without_a_step_a_branch_begins_at_the_newest(base, parent):
    root, overrides = base
    longer = [*overrides, f"training.total_steps={STEPS + 1}"]
    assert run_plainly(["name=newest", f"resume_from={parent}", *longer]) == 0
    assert train_losses(root / "newest").keys() == {STEPS + 1}


def test_a_branch_that_cannot_be_is_refused_with_every_reason(base, parent, tmp_path):
    _, overrides = base
    branch = ["name=refused", *overrides]
    (problem,) = refusal([*branch, f"resume_from={parent}@5"])
    assert problem.startswith("resume_from: ") and problem.endswith(
        "the complete ones there are of the steps 2, 4, 6, 8"
    )
    other = ["seed=1", "model.logit_soft_cap=20.0", "training.total_steps=4"]
    model, length, seed = refusal([*branch, f"resume_from={parent}@4", *other])
    assert model.startswith("resume_from: the model of ") and model.endswith("or add model.logit_soft_cap=30.0")
    assert length.startswith("training.total_steps: the branch begins at step 4, 1,024 tokens, and has nothing left")
    assert seed == "seed: a branch keeps its parent's order of samples; set it to 0 (1)"
    (problem,) = refusal([*branch, f"resume_from={parent}@4", "corpus.split=validation"])
    assert problem.startswith("corpus.split: validation gives other data than train gave")
    weights = parent / "checkpoints" / "step-00000004" / "weights"
    shutil.copytree(weights, tmp_path / "bare")
    (problem,) = refusal([*branch, f"resume_from={tmp_path / 'bare'}"])
    assert "no optimizer, counters or place in the data" in problem
    assert f"initialise_from={tmp_path / 'bare'}" in problem
    (problem,) = refusal([*branch, f"resume_from={parent}", f"initialise_from={parent}"])
    assert problem.startswith("initialise_from: set initialise_from (")
    problems = refusal([*branch, "resume_from=' '", "initialise_from=''"])
    assert [problem.split(";")[0] for problem in problems] == ["initialise_from: empty", "resume_from: empty"]
    # Nothing was begun.
    assert not (parent.parent / "refused").exists()


def test_a_copied_run_is_refused_and_told_how_to_branch(base, parent):
    root, overrides = base
    shutil.copytree(parent, root / "copy")
    (problem,) = refusal(["name=copy", *overrides])
    assert "holds the run 'parent', copied or renamed" in problem
    assert f"start a branch: name=copy resume_from={root / 'parent'}@STEP" in problem


def test_a_damaged_source_is_refused_before_the_run_begins(base, parent, tmp_path):
    root, overrides = base
    shutil.copytree(parent, tmp_path / "parent")
    moment = tmp_path / "parent" / "checkpoints" / "step-00000004" / "exp_avg" / "weights-00000.safetensors"
    content = bytearray(moment.read_bytes())
    content[-10] ^= 1
    moment.write_bytes(content)
    (problem,) = refusal(["name=damaged", f"resume_from={tmp_path / 'parent'}@4", *overrides])
    assert problem.startswith("resume_from: ") and "is damaged" in problem and "was altered" in problem
    # The weights are whole, and another source is no change of a run that has not begun.
    assert run_plainly(["name=damaged", f"initialise_from={tmp_path / 'parent'}@4", *overrides]) == 0
    assert not list((root / "damaged" / "checkpoints").glob("set-aside*"))


def test_a_run_begins_with_weights_and_everything_else_anew(base, parent, capsys):
    root, overrides = base
    watch = Watch()
    start = ["name=tuned", *overrides, "training.sequence_length=16", "seed=7"]
    assert run_plainly([*start, f"initialise_from={parent}@4"], [watch]) == 0
    stored = open_stored(f"{parent}@4")
    assert watch.weights.keys() == stored.shapes.keys()
    assert all(torch.equal(watch.weights[name], stored.read(name)) for name in stored.shapes)
    assert not any(moment.any() for moment in watch.moments)
    assert (watch.state.step, watch.state.applied_steps, watch.state.tokens, watch.state.next_sample) == (0, 0, 0, 0)
    (event,) = events_of(root / "tuned", "initialise")
    assert (event["run"], event["step"], event["attempt"]) == (str(parent), 4, 1)
    assert len(events_of(root / "tuned", "start")) == 1
    assert f"initialise_from: {parent}@4" in (root / "tuned" / "config.yaml").read_text()

    # It goes on from its own checkpoints, whatever becomes of its source.
    gone = ["name=tuned2", *overrides, f"initialise_from={root / 'gone'}"]
    shutil.copytree(parent, root / "gone")
    assert run_plainly(gone) == 0
    shutil.rmtree(root / "gone")
    assert run_plainly([*gone, f"training.total_steps={STEPS + 1}"]) == 0
    assert len(events_of(root / "tuned2", "initialise")) == 1
    # Started with another source, or none, it would not say where it comes from.
    for other in (f"initialise_from={parent}@2", "initialise_from=null"):
        (problem,) = refusal([*gone, other])
        assert "goes on from its own checkpoints; start it with the same again" in problem


def test_the_command_that_a_refusal_gives_takes_the_model_of_the_source(base, tmp_path):
    root, overrides = base
    config = dataclasses.replace(CONFIGS["mlstm"], vocab_size=384)
    export_huggingface(random_model(config), tmp_path / "theirs", verify=False, dtype=torch.bfloat16)
    start = ["name=theirs", *overrides, f"initialise_from={tmp_path / 'theirs'}", "training.total_steps=1"]
    (problem,) = refusal(start)
    assert "slstm={n_heads: 2" in problem
    watch = Watch()
    assert run_plainly([*start, *shlex.split(problem.partition(", or add ")[2])], [watch]) == 0
    stored = open_stored(tmp_path / "theirs")
    assert watch.weights.keys() == stored.shapes.keys() == dict(random_model(config).named_parameters()).keys()
    assert all(torch.equal(watch.weights[name], stored.read(name).float()) for name in stored.shapes)
    # What only chooses first values is no difference.
    first_values = ["name=theirs2", "model.mlstm.igate_bias_init=-7.0"]
    assert run_plainly([*start, *shlex.split(problem.partition(", or add ")[2]), *first_values]) == 0
    assert read_ancestry(root / "theirs2")["source"] == str(tmp_path / "theirs")


def test_another_tokenizer_than_the_weights_were_trained_with_is_refused(base, parent, tmp_path, capsys):
    root, overrides = base
    weights = tmp_path / "weights"
    shutil.copytree(parent / "checkpoints" / "step-00000004" / "weights", weights)
    start = [*overrides, f"initialise_from={weights}", "training.total_steps=1"]
    assert run_plainly(["name=untold", *start]) == 0
    assert "has no tokenizer" in capsys.readouterr().err
    shutil.copytree(OLDER / "corpus" / "tokenizer", weights / "tokenizer")
    (problem,) = refusal(["name=other_ids", *start])
    assert problem.startswith("corpus.directory: ")
    assert f"tokenizer=file tokenizer.path={weights / 'tokenizer' / 'tokenizer.model'}" in problem


class GoBack(Callback):
    """Takes the run back to before its first checkpoint, once."""

    def __init__(self):
        self.seen = None

    def on_step_end(self, trainer):
        return Rollback(0, 0, "a test") if trainer.step == trainer.total_steps - 1 and self.seen is None else CONTINUE

    def on_rollback(self, trainer, rollback, left):
        self.seen = trainer.step, {f.name: f.master.clone().view(f.shape) for f in trainer.engine.fragments}


@pytest.mark.parametrize(("key", "step"), [("initialise_from", 0), ("resume_from", 4)])
def test_a_rollback_to_the_beginning_goes_to_the_source(key, step, base, parent):
    """Also where an earlier start read it, and the run's own first checkpoints are deleted."""
    root, overrides = base
    start = [f"name={key}", *overrides, f"{key}={parent}@4", "checkpoint.keep_last=1", "checkpoint.interval=0"]
    assert run_plainly([*start, f"training.total_steps={step + 1}"]) == 0
    assert [folder.name for folder in (root / key / "checkpoints").iterdir()] == [f"step-{step + 1:08d}"]
    back = GoBack()
    assert run_plainly([*start, f"training.total_steps={step + 3}"], [back]) == 0
    stored = open_stored(f"{parent}@4")
    assert back.seen[0] == step
    assert all(torch.equal(back.seen[1][name], stored.read(name)) for name in stored.shapes)


def test_every_key_of_the_events_of_a_beginning(base, parent):
    """Of a run, and of a folder that is no checkpoint."""
    root, overrides = base
    for name in ("keys_branch", "keys_run", "keys_folder"):
        weights = parent / "checkpoints" / "step-00000004" / "weights"
        if name == "keys_folder" and not (root / "bare").exists():
            shutil.copytree(weights, root / "bare")
        key = "resume_from" if name == "keys_branch" else "initialise_from"
        source = root / "bare" if name == "keys_folder" else f"{parent}@4"
        assert run_plainly([f"name={name}", *overrides, f"{key}={source}", "training.total_steps=5"]) == 0
    for name, kind in (("keys_branch", "branch"), ("keys_run", "initialise"), ("keys_folder", "initialise")):
        documented = keys_and_types([row for row in table("training.md", "event") if quoted(row[0]) == [kind]])
        (event,) = events_of(root / name, kind)
        assert event.keys() == documented.keys() | {"time", "event"}
        assert all(has_type(event[key], words) for key, words in documented.items())


def test_a_branch_has_a_wandb_id_of_its_own(tmp_path):
    callback = WandbLogger()
    callback.load_state_dict({"id": "of_parent"})
    branch = callback._find_id(tmp_path, is_branch=True)
    assert branch != "of_parent"
    assert callback._find_id(tmp_path, is_branch=True) == branch


@pytest.mark.slow
def test_sharded_ranks_begin_from_weights_and_branch(base, parent):
    """As one process does, to rounding."""
    root, overrides = base
    steps = ["training.total_steps=6", "parallel=zero3"]
    alone = ["name=alone", *overrides, "training.total_steps=3", f"initialise_from={parent}@4"]
    assert run_plainly(alone) == 0
    tuned = run_train(
        ["name=sharded", *overrides, *steps, "training.total_steps=3", f"initialise_from={parent}@4"], processes=2
    )
    assert tuned.returncode == 0, tuned.stderr
    branch = run_train(["name=sharded_branch", *overrides, *steps, f"resume_from={parent}@4"], processes=2)
    assert branch.returncode == 0, branch.stderr
    for name, expected in (("sharded", train_losses(root / "alone")), ("sharded_branch", train_losses(parent))):
        got = train_losses(root / name)
        assert got and all(abs(expected[step] - loss) <= 1e-5 for step, loss in got.items())

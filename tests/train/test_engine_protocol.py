"""Trainer, evaluation, checkpoints and callbacks on a second engine: nothing else in train/ needs DeepSpeed."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.runs import ROOT, environment, run_train
from tests.train.plain_engine import PlainEngine
from tests.train.plain_runs import figures, run_plainly, train_losses
from train.run_directory import read_events

STEPS = 12
SETTINGS = [
    f"training.total_steps={STEPS}",
    "evaluation.interval=4",
    "checkpoint.interval=4",
    "logging.monitor_interval=3",
    "parallel=zero0",
]


@pytest.fixture(scope="module")
def whole(small_corpus, tmp_path_factory):
    """The folder of a run on PlainEngine, and its overrides."""
    from tests.runs import TINY_RUN

    root = tmp_path_factory.mktemp("plain")
    overrides = [f"run_root={root}", f"corpus.directory={small_corpus}", *TINY_RUN, *SETTINGS]
    assert run_plainly(["name=whole", *overrides]) == 0
    return root / "whole", overrides


def forget_after(run_directory, name, step):
    """A copy of a run as it was when the checkpoint of `step` was its newest."""
    copy = run_directory.parent / name
    shutil.copytree(run_directory, copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("name: whole", f"name: {name}"))
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return copy


def test_a_run_writes_what_every_run_writes(whole):
    folder, _ = whole
    assert [line[0] for line in figures(folder) if len(line) == 4] == list(range(1, STEPS + 1))
    assert [line[0] for line in figures(folder) if len(line) == 3] == [4, 8, 12]
    kinds = [json.loads(line)["kind"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("statistics") == STEPS // 3
    events = [event["event"] for event in read_events(folder)]
    assert events[0] == "start" and events[-1] == "complete" and events.count("save") == 3
    assert json.loads((folder / "deepspeed.json").read_text()) == {"engine": "plain"}
    assert train_losses(folder)[STEPS] < train_losses(folder)[1]


def test_a_resumed_run_is_bitwise_that_which_never_stopped(whole):
    folder, overrides = whole
    copy = forget_after(folder, "resumed", 4)
    assert run_plainly(["name=resumed", *overrides]) == 0
    (resume,) = [event for event in read_events(copy) if event["event"] == "resume"]
    assert resume["step"] == 4
    assert figures(copy) == figures(folder)


@pytest.mark.slow
def test_losses_and_held_out_losses_are_those_of_deepspeed(whole, tmp_path):
    folder, overrides = whole
    done = run_train(["name=zero", *overrides, f"run_root={tmp_path}"])
    assert done.returncode == 0, done.stderr
    expected, got = figures(folder), figures(tmp_path / "zero")
    assert [line[0] for line in got] == [line[0] for line in expected]
    for ours, theirs in zip(expected, got, strict=True):
        which = 1 if len(ours) == 4 else 2
        assert abs(ours[which] - theirs[which]) <= 1e-6, (ours, theirs)


@pytest.mark.slow
def test_its_checkpoint_loads_under_a_sharded_engine(whole):
    folder, overrides = whole
    copy = forget_after(folder, "sharded", 8)
    done = run_train(["name=sharded", *overrides, "parallel=zero3"], processes=2)
    assert done.returncode == 0, done.stderr
    expected, got = train_losses(folder), train_losses(copy)
    assert max(abs(expected[step] - got[step]) for step in expected) <= 1e-5


def test_nothing_but_its_engine_imports_deepspeed():
    code = (
        "import sys, train.run, train.trainer, train.parallel.engine, train.checkpoints.reader; "
        "print('deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stdout + done.stderr


class _Broken(PlainEngine):
    """As on a GPU behind an error of its own: nothing that asks it works any more."""

    def train_batch(self, micro_batches, valid_tokens):
        raise RuntimeError("a misaligned address")

    def close(self):
        raise RuntimeError("asked again")


def test_of_a_run_that_fails_twice_the_first_failure_is_told(whole, tmp_path, caplog):
    _, overrides = whole
    with pytest.raises(RuntimeError, match="a misaligned address"):
        run_plainly(["name=broken", *overrides, f"run_root={tmp_path}"], engine=_Broken)
    assert read_events(tmp_path / "broken")[-1]["message"] == "a misaligned address"
    assert "asked again" in caplog.text

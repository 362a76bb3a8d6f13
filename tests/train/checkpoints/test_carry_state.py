"""What rows carry from step to step outlives kills, other numbers of ranks and rollbacks."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from conf import compose
from model.locate import complete_checkpoints
from tests.runs import run_train
from tests.train.checkpoints.test_resume import STEPS, events, lines_of, losses, start_and_kill_at
from train.callbacks.base import Callback
from train.config import RunConfig
from train.decisions import CONTINUE, Rollback
from train.run import train

# Chunks of 12 tokens and 8 for the last; segments of 5 windows, so that rows begin anew between checkpoints.
CARRY = ["training.carry_state=true", "training.carry_windows=5", "training.time_chunk=12"]


@pytest.mark.slow
def test_a_killed_run_goes_on_bitwise_and_on_another_number_of_ranks_to_rounding(tiny_run, tmp_path):
    overrides = [*tiny_run[1:], *CARRY, f"training.total_steps={STEPS}", "checkpoint.interval=3"]
    whole = run_train(["name=whole", *overrides], processes=2)
    assert whole.returncode == 0, whole.stderr

    step = random.Random().randint(4, STEPS - 6)
    print(f"killed at step {step}")
    start_and_kill_at(["name=killed", *overrides], tmp_path / "killed", step)
    shutil.copytree(tmp_path / "killed", tmp_path / "moved" / "killed")
    again = run_train(["name=killed", *overrides], processes=2)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")

    # Four rows of each of two ranks become eight of one, in other micro-batches and without chunks.
    changed = ["parallel=zero3", "training.micro_batch_size=4", "training.time_chunk=null"]
    moved = run_train(["name=killed", *overrides, f"run_root={tmp_path / 'moved'}", *changed])
    assert moved.returncode == 0, moved.stderr
    (resume,) = events(tmp_path / "moved" / "killed", "resume")
    assert resume["step"] > 0 and resume["saved_by_world_size"] == 2 and resume["world_size"] == 1
    for name in ("loss", "grad_norm"):
        expected, got = (
            [x[name] for x in lines_of(folder) if x["kind"] == "train"]
            for folder in (tmp_path / "whole", tmp_path / "moved" / "killed")
        )
        assert got == pytest.approx(expected, rel=1e-5)
    newest = complete_checkpoints(tmp_path / "whole" / "checkpoints")[-1]
    marker = json.loads((newest / "complete.json").read_text())
    assert {f"carried/lanes-0000{rank}.safetensors" for rank in (0, 1)} <= marker["files"].keys()


class GoBackTwice(Callback):
    """After step 5 to step 4 and on from there, after step 7 to step 4 and on one step later; keeps what is carried."""

    def __init__(self):
        self.wishes = {5: [Rollback(4, 0, "a test")], 7: [Rollback(4, 1, "a test")]}
        self.seen, self.at_step_5 = [], []

    def on_step_start(self, trainer):
        if trainer.step == 5:
            self.at_step_5.append(carried(trainer))

    def on_step_end(self, trainer):
        wishes = self.wishes.get(trainer.step)
        return wishes.pop() if wishes else CONTINUE

    def on_rollback(self, trainer, rollback, left):
        self.seen.append(carried(trainer))


def carried(trainer):
    return {name: tensor.clone() for name, tensor in trainer.engine.carried.tensors().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_rollback_takes_up_what_was_carried_and_empties_rows_whose_windows_are_left_out(tiny_run, tmp_path):
    callback = GoBackTwice()
    overrides = [*tiny_run, *CARRY, "training.total_steps=8", "checkpoint.interval=4", "parallel=zero0"]
    assert train(compose(RunConfig, "train", overrides), [callback]) == 0
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "carried" / "lanes-00000.safetensors")
    assert len(callback.seen) == 2 and len(saved) > 10
    assert same(callback.seen[0], saved) and callback.seen[1] == {}
    first, again, from_empty = callback.at_step_5
    assert same(first, again) and not same(first, from_empty)


@pytest.mark.slow
def test_other_windows_need_a_reason_and_then_begin_empty(tiny_run, tmp_path, capfd):
    overrides = [*tiny_run, *CARRY, "checkpoint.interval=4", "parallel=zero0"]
    assert train(compose(RunConfig, "train", [*overrides, "training.total_steps=4"])) == 0
    changed = [*overrides, "training.carry_windows=3", "training.total_steps=5"]
    with pytest.raises(ValueError, match="training.carry_windows: 3 gives other data than 5 gave"):
        train(compose(RunConfig, "train", changed))
    # Where rows go on, their number is part of the order of the data.
    with pytest.raises(ValueError, match="training.global_batch_size: 16 gives other data than 8 gave"):
        train(compose(RunConfig, "train", [*overrides, "training.global_batch_size=16", "training.total_steps=5"]))
    seen = []

    class Look(Callback):
        def on_run_start(self, trainer):
            seen.append(trainer.engine.carried.tensors())

    assert train(compose(RunConfig, "train", [*changed, "corpus.allow_changed_data='a test'"]), [Look()]) == 0
    assert seen == [{}]

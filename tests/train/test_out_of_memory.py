"""Memory that runs out ends a run with what was asked, what the plan said and what to change, and no traceback."""

import pytest
import torch

from conf import compose
from tests.runs import run_train
from tests.train.plain_engine import PlainEngine
from train.config import RunConfig
from train.run import train
from train.run_directory import read_events

FAR_TOO_MUCH = 2**50


class Greedy(PlainEngine):
    """Asks for more memory than there is in the third step."""

    steps = 0

    def train_batch(self, micro_batches, valid_tokens):
        self.steps += 1
        if self.steps == 3:
            torch.empty(FAR_TOO_MUCH, dtype=torch.uint8, device=self.mesh.device)
        return super().train_batch(micro_batches, valid_tokens)


class Broken(PlainEngine):
    """Raises what has nothing to do with memory."""

    def train_batch(self, micro_batches, valid_tokens):
        raise RuntimeError("a fault of its own")


def start(factory, tiny_run, *more):
    return train(compose(RunConfig, "train", [*tiny_run, "training.total_steps=4", *more]), (), factory)


def test_a_host_without_memory(tiny_run, tmp_path, capsys):
    assert start(Greedy, tiny_run, "checkpoint.interval=2") == 1
    said = capsys.readouterr().err
    asked = f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {FAR_TOO_MUCH}"
    assert f"this machine's memory is used up ({asked}" in said
    assert "By the plan a rank needs 0.0" in said and "activations" in said and "optimizer" in said
    for key in (
        "training.micro_batch_size (2)",
        "parallel.activation_checkpointing=block (none)",
        "training.time_chunk",
    ):
        assert key in said
    assert "The same command resumes from the last checkpoint" in said and "Traceback" not in said
    (error,) = [event for event in read_events(tmp_path / "run") if event["event"] == "error"]
    assert "this machine's memory is used up" in error["message"]
    assert start(PlainEngine, tiny_run, "checkpoint.interval=2") == 0


def test_other_errors_are_not_taken_for_it(tiny_run):
    with pytest.raises(RuntimeError, match="a fault of its own"):
        start(Broken, tiny_run)


@pytest.mark.gpu
def test_a_gpu_without_memory(tiny_run):
    batch = ["training.micro_batch_size=262144", "training.global_batch_size=262144"]
    settings = [*batch, "training.sequence_length=1024"]
    done = run_train([*tiny_run, *settings, "training.total_steps=1", "corpus.max_epochs=1e9"])
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the GPU's memory is used up" in done.stderr and "kept by the allocator" in done.stderr

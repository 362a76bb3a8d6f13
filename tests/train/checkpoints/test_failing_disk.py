"""A disk that fails while a checkpoint is written: known at once, tried again, and no end of the run."""

import json
from collections import namedtuple

import pytest

from model.locate import complete_checkpoints
from tests.runs import run_script, run_train
from tests.train.checkpoints.test_resume import events, losses
from tests.train.plain_runs import run_plainly
from train import context
from train.callbacks.step_lines import StepLines

# `python -m train` whose rank RANK cannot write more than 4 kB to a file while one of the steps FIRST to LAST runs: the
# system refuses, as where a disk is full. Arguments: RANK FIRST LAST OVERRIDE...
FULL_DISK = """
import resource
import sys

from train.__main__ import end_process, main
from train.callbacks.checkpointing import Checkpointing
from train.trainer import Trainer

rank, first, last = map(int, sys.argv[1:4])
usual = resource.getrlimit(resource.RLIMIT_FSIZE)
train_step = Trainer.train_step


def on_a_full_disk(self, loader):
    # A save that began before is let end: only those of these steps fail.
    is_full = self.mesh.rank == rank and first <= self.step + 1 <= last
    if first <= self.step + 1 <= last + 1:
        self.settle_save()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, usual[1]) if is_full else usual)
    return train_step(self, loader)


Trainer.train_step = on_a_full_disk
end_process(main(sys.argv[4:]))
"""


def run_on_full_disk(tmp_path, rank, first, last, overrides, processes):
    script = tmp_path / "full_disk.py"
    script.write_text(FULL_DISK)
    return run_script(script, [str(rank), str(first), str(last), *overrides], processes)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "processes"), [(0, 1), (0, 2), (1, 2)])
def test_a_save_that_fails_on_any_rank_is_tried_again_and_the_run_goes_on(rank, processes, tiny_run, tmp_path):
    overrides = [*tiny_run[1:], "training.total_steps=12", "checkpoint.interval=4"]
    # What is saved from step 4 to step 8 fails, the tries in between too.
    done = run_on_full_disk(tmp_path, rank, 4, 8, ["name=full", *overrides], processes)
    assert done.returncode == 0, done.stderr
    failed = events(tmp_path / "full", "save_failed")
    assert [(event["rank"], event["failures"]) for event in failed][:2] == [(rank, 1), (rank, 2)]
    assert all("File too large" in event["problem"] for event in failed)
    assert f"a checkpoint could not be written (rank {rank}: " in done.stderr
    assert "Older checkpoints are untouched" in done.stderr and "Traceback" not in done.stderr
    saved = [event["step"] for event in events(tmp_path / "full", "save")]
    assert saved[-1] == 12 and min(saved) > 8
    folders = sorted(path.name for path in (tmp_path / "full" / "checkpoints").iterdir())
    assert folders == [folder.name for folder in complete_checkpoints(tmp_path / "full" / "checkpoints")]
    whole = run_train(["name=whole", *overrides], processes)
    assert whole.returncode == 0 and losses(tmp_path / "full") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_with_what_to_do(tiny_run, tmp_path):
    # Few lines of metrics, whose file would meet the limit too.
    overrides = [*tiny_run, "training.total_steps=40", "checkpoint.interval=5", "logging.interval=20"]
    overrides.append("checkpoint.max_failed_saves=2")
    done = run_on_full_disk(tmp_path, 0, 6, 40, overrides, 1)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "3 checkpoints in a row could not be written, more than checkpoint.max_failed_saves=2" in done.stderr
    assert "it resumes from the last checkpoint that is whole" in done.stderr
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000005"]
    again = run_train(overrides)
    assert again.returncode == 0, again.stderr
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [5]


@pytest.mark.slow
def test_the_last_checkpoint_of_a_run_that_cannot_be_written_fails_the_run(tiny_run, tmp_path):
    done = run_on_full_disk(tmp_path, 0, 3, 3, [*tiny_run, "training.total_steps=3"], 1)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the last checkpoint, of step 3, could not be written" in done.stderr
    assert len(events(tmp_path / "run", "save_failed")) == 2


def test_a_start_asks_for_room_for_all_checkpoints_that_will_be_there(tiny_run, monkeypatch, capsys):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(context.shutil, "disk_usage", lambda path: usage(1000))
    missing_of = {"training.total_steps=9": 3, "training.total_steps=30": 4, "checkpoint.interval=0": 1}
    for setting, missing in missing_of.items():
        assert run_plainly([*tiny_run, "training.total_steps=9", "checkpoint.interval=3", setting, "name=room"]) == 1
        assert f"and {missing} more checkpoints of" in capsys.readouterr().err


def test_a_metrics_file_that_cannot_be_written_is_named(tmp_path):
    lines = StepLines(tmp_path / "metrics.jsonl", {"kind": "header"}, 0)
    lines._file.close()
    lines._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        lines.append({"step": 1})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"kind": "header"}

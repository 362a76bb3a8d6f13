"""Every write of a save fails once, one after another: an older checkpoint is whole, and the run goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.runs import run_script
from tests.train.checkpoints.test_resume import events

RUN = """
import itertools
import sys
from pathlib import Path

from conf import compose
from tests.train.checkpoints.failing_writes import FailingSaves
from tests.train.plain_engine import PlainEngine
from train.__main__ import end_process
from train.config import RunConfig
from train.run import make_engine, train

run, error, numbers, rank, engine, *overrides = sys.argv[1:]
numbers = itertools.count(1) if numbers == "all" else map(int, numbers.split(","))
saves = FailingSaves(Path(run), int(error), numbers, int(rank))
factory = PlainEngine if engine == "plain" else make_engine
code = train(compose(RunConfig, "train", overrides), [saves], factory)
print("failed:", *saves.failed, sep="\\n")
print("told", saves.told)
end_process(code)
"""
# Steps that cost little: a save is what is looked at.
SMALL = ["model.n_blocks=2", "training.sequence_length=8", "training.global_batch_size=2"]
SMALL += ["training.micro_batch_size=1"]
EVERY_STEP = ["checkpoint.interval=1", "checkpoint.keep_last=2", "logging.interval=1000", "schedule=constant"]


def run_with_failing_saves(folder: Path, overrides: list[str], error: int, numbers: str, rank: int, processes: int):
    script = folder / "failing.py"
    script.write_text(RUN)
    engine = "plain" if processes == 1 else "real"
    arguments = [str(folder / "run"), str(error), numbers, str(rank), engine]
    return run_script(script, [*arguments, *overrides, *SMALL, *EVERY_STEP, "training.total_steps=1000"], processes)


@pytest.mark.slow
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_after_any_write_that_fails_an_older_checkpoint_is_whole_and_the_run_goes_on(error, tiny_run, tmp_path):
    done = run_with_failing_saves(tmp_path, [*tiny_run, "parallel=zero0"], error, "all", 0, 1)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    failed = done.stdout.partition("failed:\n")[2].splitlines()[:-1]
    assert {line.split()[0] for line in failed} >= {"mkdir", "open", "write", "fsync", "rename", "remove", "rmdir"}
    # Each once: the last that failed was the last of a save.
    assert len(failed) > 50
    told = events(tmp_path / "run", "save_failed")
    assert len(told) > 30 and all(os.strerror(error) in event["problem"] for event in told)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "error"), [(0, errno.ENOSPC), (1, errno.EIO)])
def test_a_write_that_fails_on_one_of_two_ranks_is_told_by_both(rank, error, tiny_run, tmp_path):
    done = run_with_failing_saves(tmp_path, tiny_run, error, "1,4,7,10,13", rank, 2)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    told = events(tmp_path / "run", "save_failed")
    assert len(told) == 5 and {event["rank"] for event in told} == {rank}

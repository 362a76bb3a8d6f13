"""Ranks of a killed job that outlive it never reach what the next start writes, nor does any other stray file."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from model.loading import load
from tests.runs import PATIENCE, ROOT, TINY_RUN, environment, reserved_port, run_script, run_train
from tests.train.plain_runs import run_plainly
from train.checkpoints.layout import MARKER, remove_torn
from train.errors import RunError
from train.run_directory import Attempt, RunLock

# `python -m train` whose rank 1 waits for a file before it writes its part of a checkpoint, or before it reports it.
DELAYED = """
import os, sys, time
from pathlib import Path
from train.__main__ import end_process, main
from train.checkpoints import writer

place, go_on, *overrides = sys.argv[1:]

def wait():
    Path(f"{go_on}.waits").touch()
    while not Path(go_on).exists():
        time.sleep(0.01)

write = writer._Snapshot.write

def delayed(self, *arguments):
    if place == "before":
        wait()
    files = write(self, *arguments)
    if place == "behind":
        wait()
    return files

if os.environ["RANK"] == "1":
    writer._Snapshot.write = delayed
end_process(main(overrides))
"""


def listing(checkpoints):
    return {path.relative_to(checkpoints).as_posix() for path in checkpoints.rglob("*") if path.is_file()}


def wait_for(found, process):
    deadline = time.monotonic() + PATIENCE
    while not found():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def overrides(tiny_run):
    return [*tiny_run, "training.total_steps=4", "checkpoint.interval=2", "parallel=zero1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "meanwhile"),
    [
        ("before", "running"),
        pytest.param("behind", "stopped", marks=pytest.mark.long),
        pytest.param("behind", "running", marks=pytest.mark.long),
        pytest.param("before", "stopped", marks=pytest.mark.long),
    ],
)
def test_a_rank_that_outlives_its_job_reaches_no_checkpoint_of_the_next_start(place, meanwhile, overrides, tmp_path):
    script, go_on = tmp_path / "delayed.py", tmp_path / "go on"
    script.write_text(DELAYED)
    checkpoints = tmp_path / "run" / "checkpoints"
    command = [sys.executable, str(script), place, str(go_on), *overrides]
    with reserved_port() as port:
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [
            subprocess.Popen(
                command,
                env=environment() | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        orphan = ranks[1]
        try:
            wait_for((tmp_path / "go on.waits").exists, orphan)
            (staged,) = checkpoints.iterdir()
            assert staged.name.startswith("step-00000002.") and staged.suffix == ".partial"
            if meanwhile == "stopped":
                orphan.send_signal(signal.SIGSTOP)
            ranks[0].kill()
            ranks[0].communicate()

            # The next start is not kept from its work by it.
            again = run_train(overrides, processes=2)
            assert again.returncode == 0, again.stderr
            before = listing(checkpoints)
            assert {name.split("/")[0] for name in before} == {"step-00000002", "step-00000004"}
            if meanwhile == "stopped":
                assert orphan.poll() is None
                orphan.send_signal(signal.SIGCONT)
            go_on.touch()
            orphan.communicate(timeout=PATIENCE)
            assert orphan.returncode != 0
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    assert listing(checkpoints) == before
    for step in (2, 4):
        folder = checkpoints / f"step-{step:08d}"
        files = json.loads((folder / MARKER).read_text())["files"]
        assert {path.removeprefix(f"{folder.name}/") for path in before if path.startswith(folder.name)} == {
            *files,
            MARKER,
        }
    longer = run_train([*overrides, "training.total_steps=5"], processes=2)
    assert longer.returncode == 0, longer.stderr
    assert "from step-00000004" in longer.stderr


def test_a_start_that_was_taken_over_says_so_and_writes_nothing(tmp_path):
    first = RunLock(tmp_path / "run.lock")
    attempt = Attempt(first.attempt.identity, tmp_path / "run.lock")
    attempt.check()
    first.release()
    # Nobody else has begun.
    attempt.check()
    second = RunLock(tmp_path / "run.lock")
    second.attempt.check()
    with pytest.raises(RunError) as error:
        attempt.check()
    assert str(error.value) == (
        f"{tmp_path}: another start has taken over this run (process {os.getpid()} on {os.uname().nodename}, attempt "
        f"{second.attempt.identity}); this process of attempt {attempt.identity} ends and writes nothing more there"
    )
    for change in ((tmp_path / "run.lock").unlink, (tmp_path / "run.lock").touch):
        change()
        with pytest.raises(RunError, match="its lock file is empty"):
            second.attempt.check()
    second.release()


TAKEN_OVER = """
import sys
from train.__main__ import end_process, main
from train.callbacks.metrics_file import MetricsFile

on_metrics = MetricsFile.on_metrics

def taken_over(self, trainer, record):
    on_metrics(self, trainer, record)
    if record["step"] == 3:
        trainer.await_own_save()
        # As on a file system whose locks do not reach other machines.
        trainer.context.attempt.lock.write_text("process 1 on other, attempt 0123456789ab")

MetricsFile.on_metrics = taken_over
end_process(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_that_another_start_has_taken_over_ends_before_it_saves(overrides, tmp_path):
    (tmp_path / "taken_over.py").write_text(TAKEN_OVER)
    ended = run_script(tmp_path / "taken_over.py", overrides)
    assert ended.returncode == 1
    assert "another start has taken over this run (process 1 on other, attempt 0123456789ab)" in ended.stderr
    assert "Traceback" not in ended.stderr and "make room" not in ended.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_files_that_no_marker_lists_are_none_of_the_checkpoint(small_corpus, tmp_path):
    run = [f"run_root={tmp_path}", f"corpus.directory={small_corpus}", *TINY_RUN, "name=run", "parallel=zero0"]
    run += ["schedule=constant"]
    assert run_plainly([*run, "training.total_steps=1"]) == 0
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    marker = json.loads((folder / MARKER).read_text())
    assert marker["attempt"] in (tmp_path / "run" / "run.lock").read_text()
    for part in ("weights", "exp_avg", "exp_avg_sq"):
        shutil.copy(folder / part / "weights-00000.safetensors", folder / part / "weights-00001.safetensors")
    (folder / "carried").mkdir()
    (folder / "carried" / "lanes-00000.safetensors").touch()
    assert run_plainly([*run, "training.total_steps=2"]) == 0
    load(folder)


def test_what_earlier_starts_staged_is_deleted_and_what_a_user_keeps_is_not(tmp_path):
    for name in ("step-00000002.0123456789ab.partial", "step-00000002.mine.partial", "step-00000002.0123456789ab"):
        (tmp_path / name / "weights").mkdir(parents=True)
    assert remove_torn(tmp_path) == ["step-00000002.0123456789ab.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000002.0123456789ab",
        "step-00000002.mine.partial",
    ]

"""Runs as a table, their logs, and what a machine lacks: without Slurm, from folders alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.folder import LaunchFolder
from launch.slurm import QueuedJob
from launch.status import find_runs, status_of, table
from tests.runs import ROOT, environment
from train.run_directory import RunDirectory

RELEASE = Path(__file__).parents[1] / "fixtures" / "0.2.0" / "runs"


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """One run of an earlier version, which has begun, and one that waits to begin."""
    monkeypatch.setenv("PATH", "nowhere")
    shutil.copytree(sorted(RELEASE.iterdir())[0], tmp_path / "old")
    waiting = LaunchFolder(tmp_path / "group" / "waiting")
    RunDirectory(waiting.run).create()
    waiting.path.mkdir()
    waiting.job.write_text("{}")
    waiting.jobs.write_text("12\n13\n")
    waiting.note("submit")
    return tmp_path


def test_all_runs_below_a_folder_are_shown(runs, capsys):
    assert find_runs(runs) == [runs / "group" / "waiting", runs / "old"]
    assert main(["status", str(runs)]) == 0
    printed = capsys.readouterr()
    head, waiting, old = printed.out.splitlines()
    assert head.split()[:4] == ["run", "queue", "state", "step"]
    assert "not started" in waiting and "old" not in waiting.split()[0]
    assert "The queue is not known: launch: squeue is not on this machine" in printed.err
    assert main(["status", str(runs / "old"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["steps"] > 0 and found["loss"] > 0 and found["attempts"] == 0 and found["queue"] is None


def test_a_run_that_cannot_be_read_does_not_hide_the_others(runs):
    (runs / "old" / "config.yaml").write_text("{")
    found = [status_of(run, None) for run in find_runs(runs)]
    assert [run["state"] for run in found] == ["not started", "unreadable"]
    assert "config.yaml: is no YAML" in table(found)


def test_what_the_queue_says_of_a_run(runs):
    waiting = runs / "group" / "waiting"
    queue = [QueuedJob("11", "RUNNING", "None", "n1"), QueuedJob("12", "PENDING", "Resources", "")]
    queue.append(QueuedJob("13", "PENDING", "Dependency", ""))
    found = status_of(waiting, queue)
    assert found["queue"] == "12 PENDING (Resources) +1" and [job["number"] for job in found["jobs"]] == ["12", "13"]
    assert status_of(waiting, [])["queue"] == "gone"
    folder = LaunchFolder(waiting)
    folder.note("begin", attempt=1)
    folder.note("given_up", reason="given up after 1 attempt")
    shown = table([status_of(waiting, [])])
    assert shown.splitlines()[-1] == "waiting: given up after 1 attempt"


def test_logs_of_a_rank_are_those_of_the_last_attempt(runs, capsys):
    folder = LaunchFolder(runs / "group" / "waiting")
    assert main(["logs", str(folder.run)]) == 2
    assert "none of its processes has begun" in capsys.readouterr().err
    for attempt in (2, 10):
        folder.logs(attempt).mkdir()
        (folder.logs(attempt) / "rank-00001.out").write_text(f"attempt {attempt}\n")
    assert main(["logs", str(folder.run), "--rank", "1"]) == 0 and capsys.readouterr().out == "attempt 10\n"
    assert main(["logs", str(folder.run), "--rank", "1", "--attempt", "2"]) == 0
    assert capsys.readouterr().out == "attempt 2\n"


def test_logs_are_followed_into_later_attempts(runs):
    folder = LaunchFolder(runs / "group" / "waiting")
    command = [sys.executable, "-m", "launch", "logs", str(folder.run), "--rank", "0", "--follow"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for attempt in (1, 2):
            folder.logs(attempt).mkdir()
            with (folder.logs(attempt) / "rank-00000.out").open("w") as file:
                for line in range(2):
                    print(f"attempt {attempt}, line {line}", file=file, flush=True)
                    assert process.stdout.readline() == f"attempt {attempt}, line {line}\n"
    finally:
        process.kill()
        process.communicate()


def test_a_machine_without_slurm_is_told_what_mends_it(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "nowhere")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "ok       Python packages" in printed and "without  Slurm's commands: sbatch, srun" in printed
    assert "apt-get install slurm-client" in printed

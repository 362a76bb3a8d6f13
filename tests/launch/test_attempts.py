"""What follows an attempt: another one, the end, or that the run is given up; and which nodes are left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.attempts import DONE, GIVEN_UP, GO_ON, UNFIT, begin, judge, settle, unfit_nodes
from launch.folder import LaunchFolder
from tests.runs import ROOT
from train.run_directory import EventLog, RunDirectory

NODES = ["n1", "n2"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> LaunchFolder:
    """A run on two nodes of two processes, as submitted."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}.items():
        monkeypatch.setenv(name, value)
    folder = LaunchFolder(tmp_path)
    RunDirectory(tmp_path).create()
    folder.path.mkdir()
    folder.job.write_text(json.dumps({"attempts_without_progress": 2, "exclude_after": 2, "processes_per_node": 2}))
    folder.note("submit")
    return folder


def event(folder: LaunchFolder, kind: str, **fields: object) -> None:
    EventLog(folder.run / "events.jsonl", True).append(kind, **fields)


def error(folder: LaunchFolder, rank: int) -> None:
    log = EventLog(folder.run / "events.jsonl", True)
    log.append_failure(f"attempt of rank {rank}", rank=rank, kind="error", process=5, message="out of luck")


def checkpoint(folder: LaunchFolder, step: int) -> None:
    path = folder.run / "checkpoints" / f"step-{step:08d}"
    path.mkdir()
    (path / "complete.json").write_text("{}")


def test_a_complete_run_needs_no_further_attempt(folder, capsys):
    assert begin(folder) == GO_ON and capsys.readouterr().out == "1\n"
    event(folder, "start")
    event(folder, "complete", step=4)
    assert settle(folder, 0) == DONE and begin(folder) == DONE
    assert "the run is complete" in capsys.readouterr().err
    # Submitted again, it may have been made longer: the run itself knows.
    folder.note("submit")
    assert begin(folder) == GO_ON and settle(folder, 0) == DONE


def test_a_run_that_was_asked_to_stop_goes_on(folder, capsys):
    begin(folder)
    event(folder, "start")
    event(folder, "stop", step=3, reason="SIGUSR1")
    checkpoint(folder, 3)
    capsys.readouterr()
    assert settle(folder, 0) == GO_ON and capsys.readouterr().out == "\n"
    assert begin(folder) == GO_ON and capsys.readouterr().out == "2\n"
    assert folder.history()[-1] | {"time": 0} == {
        "time": 0, "event": "begin", "attempt": 2, "job": "7", "nodes": NODES, "checkpoint": 3,
    }  # fmt: skip


def test_a_run_without_progress_is_given_up_and_says_where_it_failed_first(folder, capsys):
    checkpoint(folder, 8)
    begin(folder)
    error(folder, rank=1)
    assert settle(folder, 1) == GO_ON
    begin(folder)
    error(folder, rank=3)
    assert settle(folder, 1) == GIVEN_UP
    told = capsys.readouterr().err
    assert "given up after 2 attempts without a new checkpoint since step 8" in told
    assert "failed first in rank 3 on node n2: out of luck" in told
    assert begin(folder) == GIVEN_UP
    # Whoever submits it again has mended something.
    folder.note("submit")
    assert begin(folder) == GO_ON


def test_attempts_that_slurm_itself_ended_are_counted(folder):
    """After a lost node no line of the batch script runs."""
    assert [begin(folder) for _ in range(3)] == [GO_ON, GO_ON, GIVEN_UP]


def test_progress_begins_the_count_anew(folder):
    for step in range(1, 6):
        assert begin(folder) == GO_ON
        checkpoint(folder, step)
        assert settle(folder, 1) == GO_ON


def test_a_refused_configuration_is_not_tried_again(folder, capsys):
    begin(folder)
    assert settle(folder, 2) == GIVEN_UP and "refuses its configuration" in capsys.readouterr().err


def test_a_cancelled_run_does_not_go_on(folder):
    begin(folder)
    folder.cancelled.touch()
    assert settle(folder, 0) == DONE and begin(folder) == DONE


def test_a_rank_that_nobody_could_tell_of_is_found_in_what_srun_says(folder, capsys):
    begin(folder)
    (folder.logs(1) / "srun.err").write_text("srun: error: n2: task 2: Killed\nsrun: Terminating StepId=7.0\n")
    assert settle(folder, 137) == GO_ON
    assert "failed first in rank 2 on node n2: Killed" in capsys.readouterr().err


def test_a_node_that_fails_first_again_is_left_out(folder, capsys):
    for step in (1, 2):
        begin(folder)
        checkpoint(folder, step)
        (folder.logs(step) / "srun.err").write_text("srun: error: n2: task 2: Killed\n")
        capsys.readouterr()
        settle(folder, 1)
    assert capsys.readouterr().out == "n2\n"


def test_nodes_that_the_check_finds_unfit_are_left_out(folder, capsys):
    begin(folder)
    reports = folder.logs(1) / "nodes"
    reports.mkdir()
    (reports / "n1").write_text("version torch 2.13.0\nchecked\n")
    (reports / "n2").write_text("problem 7 of 8 GPUs are there\nversion torch 2.13.0\nchecked\n")
    capsys.readouterr()
    assert judge(folder) == UNFIT
    printed = capsys.readouterr()
    assert printed.out == "n2\n" and "node n2 is unfit: 7 of 8 GPUs are there" in printed.err
    (reports / "n2").write_text("version torch 2.13.0\nchecked\n")
    assert judge(folder) == GO_ON


def test_a_node_without_an_answer_or_with_other_versions_is_unfit(tmp_path):
    for node, version in (("n1", "2.13.0"), ("n2", "2.12.0"), ("n3", "2.13.0")):
        (tmp_path / node).write_text(f"version torch {version}\nversion numpy 2\nchecked\n")
    (tmp_path / "n4.part").write_text("version torch 2.13.0\n")
    unfit = unfit_nodes(tmp_path, ["n1", "n2", "n3", "n4"])
    assert unfit == {"n4": "no answer", "n2": "has torch 2.12.0; others torch 2.13.0"}


GPU = "0, 3, 0, Not Active, 31, 1980, 550.1\n"


@pytest.mark.parametrize(
    ("answer", "problems"),
    [
        (GPU + GPU, []),
        (GPU, ["1 of 2 GPUs are there"]),
        (GPU + "1, 40000, [N/A], Not Active, 31, 1980, 550.1\n", ["GPU 1: 40000 MiB are in use by another program"]),
        (GPU + "1, 3, 2, Active, 99, 1980, 550.1\n", [
            "GPU 1: 2 uncorrected errors of its memory",
            "GPU 1 is slowed down by its hardware",
            "GPU 1: 99 degrees Celsius",
        ]),
        (None, ["nvidia-smi fails: NVML: no driver"]),
    ],
)  # fmt: skip
def test_the_check_of_a_node(tmp_path, answer, problems):
    """On the words of nvidia-smi, of which a program stands in for."""
    program = tmp_path / "nvidia-smi"
    says = "echo 'NVML: no driver'; exit 9" if answer is None else f"printf '%s' '{answer}'"
    program.write_text(f"#!/bin/bash\n{says}\n")
    program.chmod(0o755)
    report = report_of(tmp_path, gpus=2)
    assert [line.removeprefix("problem ") for line in report if line.startswith("problem")] == problems
    assert report[-1] == "checked" and any(line.startswith("version torch ") for line in report)
    assert (answer is None) != ("version GPU-clock 1980 MHz, driver 550.1" in report)


def test_a_full_disk_and_a_python_without_packages_are_problems(tmp_path):
    report = report_of(tmp_path, gpus=0, free_gib=1e9, python="false")
    assert len([line for line in report if line.startswith("problem") and "GiB free" in line]) == 2
    assert any(line.startswith("problem false does not run") for line in report)


def report_of(folder: Path, gpus: int, free_gib: float = 0.0, python: str = sys.executable) -> list[str]:
    command = ["bash", str(ROOT / "slurm" / "preflight.sh"), str(folder), str(gpus), str(free_gib), "2000", "85"]
    variables = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURMD_NODENAME": "n1"}
    subprocess.run([*command, str(folder), python], env=variables, check=True, timeout=60)
    return (folder / "n1").read_text().splitlines()

"""Sweeps on this machine: runs one after another, killed and continued; and forks of runs."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.scaling.runs import read_runs
from launch.sweep.manifest import SweepFolder, read_manifest
from launch.sweep.plan import plan_sweep
from launch.sweep.progress import progress
from tests.launch.sweep.sweeps import sweep_of
from tests.runs import PATIENCE, ROOT, TINY_RUN, environment, run_train
from train.callbacks.metrics_file import read_metrics
from train.run_directory import read_events, read_lines

pytestmark = pytest.mark.slow


def planned(root: Path, corpus: Path, *settings: str) -> SweepFolder:
    assert plan_sweep(sweep_of(root, corpus, *settings)) == 0
    return SweepFolder(root / "tiny")


def command(folder: SweepFolder, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "launch",
        "sweep",
        "submit",
        str(folder.path),
        "--local",
        *options,
    ]


def submit(folder: SweepFolder, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *options), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )


def states(folder: SweepFolder) -> list[str]:
    return [one.state for one in progress(folder, read_manifest(folder))]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def last_step(run: Path) -> int:
    return max((line["step"] for line in read_lines(run / "metrics.jsonl") if line["kind"] == "train"), default=0)


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run) if line["kind"] == "train"}


def test_a_run_that_fails_is_named_and_does_not_stop_the_others(small_corpus, tmp_path, capsys):
    diverges = ["sweep.families.xlstm.learning_rate={value: 1.0e+30}", "training.max_skipped_steps=1"]
    once = ["launch.attempts_without_progress=1", "sweep.budgets=[1.0e9]", "numbers.bad_steps=null"]
    folder = planned(tmp_path, small_corpus, *diverges, *once)
    first, second = read_manifest(folder).rows
    done = submit(folder)
    assert done.returncode == 1
    assert (
        f"{first.name}: FAILED: given up after 1 attempts without a new checkpoint since its beginning" in done.stderr
    )
    assert states(folder) == ["failed", "done"] and f"{second.name}: {second.steps} steps, validation" in done.stderr
    assert main(["sweep", "status", str(folder.path)]) == 0
    printed = capsys.readouterr().out
    assert "2 runs: 1 done, 1 failed" in printed and f"{first.name}: given up after 1 attempts" in printed
    assert main(["sweep", "collect", str(folder.path)]) == 0
    table = read_runs([folder.path / "runs.csv"])
    assert [run.run for run in table.used] == [second.name] and table.excluded[0].excluded.startswith("failed (")


def test_a_folder_of_another_run_is_refused_before_anything_starts(small_corpus, tmp_path, capsys):
    folder = planned(tmp_path, small_corpus)
    first = read_manifest(folder).rows[0]
    folder.run(first).mkdir(parents=True)
    for name in ("config.yaml", "plan.json", "metrics.jsonl", "events.jsonl"):
        (folder.run(first) / name).write_bytes((ROOT / "tests/fixtures/0.2.0/runs/tied" / name).read_bytes())
    assert main(["sweep", "submit", str(folder.path), "--local"]) == 2
    error = capsys.readouterr().err
    assert f"{first.name}: name: {folder.run(first)} holds the run 'tied', copied or renamed" in error
    assert f"{first.name}: model.vocab_size: {folder.run(first)} was started with another value" in error
    assert not folder.run(read_manifest(folder).rows[1]).exists()
    # A table would tell of another run in its name.
    assert main(["sweep", "collect", str(folder.path)]) == 2
    assert "is another run than the manifest's row" in capsys.readouterr().err


@pytest.mark.long
def test_a_sweep_that_was_killed_goes_on_with_what_is_missing(small_corpus, tmp_path, capsys):
    folder = planned(tmp_path, small_corpus, "sweep.budgets=[1.0e9, 1.0e10]", "checkpoint.interval=20")
    rows = read_manifest(folder).rows
    started = subprocess.Popen(command(folder), env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_until(lambda: last_step(folder.run(rows[1])) > 30)
    assert states(folder) == ["done", "running", "waiting", "waiting"]
    # Of two commands the second would start the same runs.
    second = submit(folder)
    assert second.returncode == 2 and "is being started by process" in second.stderr
    started.send_signal(signal.SIGKILL)
    started.wait()
    # Ctrl-C this time: the run under way saves, and the command ends.
    started = subprocess.Popen(command(folder), env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: last_step(folder.run(rows[3])) > 30)
    started.send_signal(signal.SIGINT)
    assert "interrupted; the same command goes on" in started.communicate(timeout=PATIENCE)[1]
    assert started.returncode == 1
    stops = [event["reason"] for row in rows for event in read_events(folder.run(row)) if event["event"] == "stop"]
    assert stops[-1] == "SIGINT"
    done = submit(folder)
    assert done.returncode == 0 and states(folder) == ["done"] * 4, done.stderr
    # Where nothing is missing nothing is started.
    before = {row.name: (folder.run(row) / "events.jsonl").read_bytes() for row in rows}
    assert submit(folder).returncode == 0
    assert before == {row.name: (folder.run(row) / "events.jsonl").read_bytes() for row in rows}
    for row in rows:
        assert list(losses(folder.run(row))) == list(range(1, row.steps + 1))
    assert main(["sweep", "collect", str(folder.path)]) == 0
    table = read_runs([folder.path / "runs.csv"])
    assert [(run.run, run.family, run.budget, run.tokens) for run in table.used] == [
        (row.name, row.family, row.budget, row.tokens) for row in rows
    ]


@pytest.mark.long
def test_branches_of_one_long_run_are_the_runs_of_their_lengths(small_corpus, tmp_path, capsys):
    reuse = ["sweep.reuse={decay: 0.2, warmup: 0.1}", "~sweep.families.llama"]
    folder = planned(tmp_path, small_corpus, *reuse)
    trunk, *branches = read_manifest(folder).rows
    # Its own clock ends a sweep too, with what was done saved.
    short = submit(folder, "--minutes", "0.001")
    assert short.returncode == 1 and states(folder).count("done") < 3
    done = submit(folder)
    assert done.returncode == 0, done.stderr
    for row in branches:
        reference = [*row.overrides, f"name={row.name}", f"run_root={tmp_path / 'whole'}"]
        assert run_train(reference).returncode == 0
        whole = losses(tmp_path / "whole" / row.name)
        # Bit for bit, from the step at which the branch begins.
        assert losses(folder.run(row)) == {step: loss for step, loss in whole.items() if step > row.parent_step}
        assert read_events(folder.run(row))[0]["event"] == "branch"
    assert main(["sweep", "collect", str(folder.path)]) == 0
    table = read_runs([folder.path / "runs.csv"])
    assert [run.run for run in table.used] == [row.name for row in branches]
    assert [run.excluded for run in table.excluded] == ["is the trunk of its branches: its rate has not fallen"]
    assert [run.tokens for run in table.used] == [row.tokens for row in branches]


@pytest.mark.long
def test_a_fork_goes_on_from_a_step_of_its_parent(small_corpus, tmp_path):
    parent = ["name=run", f"run_root={tmp_path}", f"corpus.directory={small_corpus}", *TINY_RUN, "schedule=constant"]
    parent += ["checkpoint.interval=2", "training.total_steps=6"]
    assert run_train(parent).returncode == 0
    fork = [sys.executable, "-m", "launch", "fork", str(tmp_path / "run"), "step=4", "name=same", "--processes", "1"]
    done = subprocess.run(fork, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    whole = losses(tmp_path / "run")
    assert losses(tmp_path / "same") == {step: loss for step, loss in whole.items() if step > 4}


def test_what_a_fork_changes_is_told_before_it_starts(small_corpus, tmp_path, capsys):
    parent = ["name=run", f"run_root={tmp_path}", f"corpus.directory={small_corpus}", *TINY_RUN, "schedule=constant"]
    assert run_train([*parent, "checkpoint.interval=2", "training.total_steps=4"]).returncode == 0
    run = str(tmp_path / "run")
    changed = ["step=2", "name=decayed", "schedule=wsd", "schedule.decay=2", "precision=bf16"]
    assert main(["fork", run, *changed, "--plan"]) == 0
    printed = capsys.readouterr()
    assert "compute: bf16" in printed.out and f"run_root: {tmp_path}\n" in printed.out
    assert f"resume_from: {run}@2" in printed.out and "left       2 steps" in printed.err
    # The same on a cluster.
    assert main(["fork", run, *changed, "gpus_per_node=0", "processes_per_node=1", "--dry-run"]) == 0
    assert "#SBATCH --job-name=decayed" in capsys.readouterr().out
    for arguments, problem in (
        (["step=3", "name=x"], "step-00000003 does not exist; the complete ones there are of the steps 2, 4"),
        (["step=two", "name=x"], "step: one whole number of completed steps is wanted (two)"),
        (["step=2"], "name: a branch is a run of its own; give name=NAME (its parent is run)"),
        (["step=2", "name=run"], "name: run is its parent; give the branch another name"),
        (["step=2", "name=x", "resume_from=y"], "resume_from=y: a fork begins from RUN and step=N"),
        (["step=2", "name=x", "training.total_steps=2"], "the branch begins at step 2"),
        (["step=2", "name=x", "nodes=2", "--plan"], "--plan, --processes: are for this machine"),
    ):
        assert main(["fork", run, *arguments]) == 2
        assert problem in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

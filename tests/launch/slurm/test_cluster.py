"""Runs on a real Slurm of two nodes: whatever ends an attempt, the run goes on, with the losses of one left alone."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from launch.folder import LaunchFolder
from tests.launch.slurm.cluster import kill, wait_for
from tests.runs import run_train
from train.callbacks.metrics_file import read_metrics
from train.run_directory import read_lines

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
MACHINES = ["nodes=2", "gpus_per_node=0", "processes_per_node=1", "launch.exclusive=false", "launch.memory=1000"]
# Of a node without much to spare.
PREFLIGHT = ["launch.preflight.free_gib=0.1", "launch.preflight.all_reduce_mib=1"]
PATIENCE = 600


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run) if line["kind"] == "train"}


def last_step(run: Path) -> int:
    return max((line["step"] for line in read_lines(run / "metrics.jsonl") if line["kind"] == "train"), default=0)


def words_of(run: Path):
    """What the job, its last attempt and the run's events say, for a test that fails."""

    def words() -> str:
        files = [*sorted((run / "logs").glob("slurm-*.out")), *sorted((run / "logs").glob("attempt-*/*"))]
        files = [file for file in [*files, run / "launch" / "attempts.jsonl", run / "events.jsonl"] if file.is_file()]
        return "\n".join(f"== {file.name}\n{file.read_text()[-2000:]}" for file in files)

    return words


def attempts(run: Path) -> list[dict]:
    return [line for line in LaunchFolder(run).history() if line["event"] == "begin"]


def test_a_run_survives_time_limit_preemption_a_killed_rank_and_a_lost_node(
    cluster, launch, small_corpus, tmp_path, run_folder
):
    # At a constant rate: however fast this machine is, the run is ended when everything has happened to it.
    run = [
        "experiment=demo",
        "name=run",
        f"corpus.directory={small_corpus}",
        "corpus.max_epochs=100000",
        "schedule=constant",
        "schedule.warmup=5",
        "training.global_batch_size=4",
        "training.micro_batch_size=2",
        "checkpoint.interval=4",
        "logging.interval=1",
        "logging.progress=false",
        "logging.wandb.mode=disabled",
        "evaluation=none",
    ]
    machines = [*MACHINES, *PREFLIGHT, "launch.time=01:00:00", "launch.signal_seconds=120", "launch.exclude_after=0"]
    here = f"run_root={tmp_path}"
    submitted = launch("submit", *machines, *run, here, "training.total_steps=100000")
    assert submitted.returncode == 0, submitted.stderr
    job, words = submitted.stdout.strip(), words_of(run_folder)

    def takes_steps() -> int:
        """Wait until the attempt under way has taken steps; returns its number."""
        wait_for(lambda: attempts(run_folder), PATIENCE, words)
        began = attempts(run_folder)[-1]["time"]
        wait_for(lambda: any(mark["time"] >= began for mark in marks("start", "resume")), PATIENCE, words)
        target = last_step(run_folder) + 5
        wait_for(lambda: last_step(run_folder) >= target, PATIENCE, words)
        return len(attempts(run_folder))

    def ends(attempt: int) -> None:
        wait_for(lambda: len(attempts(run_folder)) > attempt, PATIENCE, words)

    def marks(*kinds: str) -> list[dict]:
        return [event for event in read_lines(run_folder / "events.jsonl") if event.get("event") in kinds]

    attempt = takes_steps()
    began = datetime.fromisoformat(attempts(run_folder)[-1]["time"])
    minutes = (datetime.now(UTC) - began) // timedelta(minutes=1) + 1
    # Slurm, which looks at its clock twice a minute, sends the signal two minutes before.
    cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2}")
    ends(attempt)
    assert [event["reason"] for event in marks("stop")] == ["SIGUSR1"], words()
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")

    attempt = takes_steps()
    urgent = ["-p", "urgent", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"]
    other = cluster.ask("sbatch", "--parsable", *urgent).strip()
    wait_for(lambda: cluster.state_of(other) == "COMPLETED", PATIENCE, words)
    ends(attempt)
    assert [event["reason"] for event in marks("stop")] == ["SIGUSR1", "SIGTERM"], words()

    attempt = takes_steps()
    (rank,) = cluster.tasks("127.0.0.2", "train")
    kill(rank)
    ends(attempt)
    ended = [line for line in LaunchFolder(run_folder).history() if line["event"] == "end" and line.get("code")]
    assert (ended[-1]["rank"], ended[-1]["node"]) == (1, "127.0.0.2"), words()

    attempt = takes_steps()
    cluster.lose_node("127.0.0.2")
    wait_for(lambda: cluster.states()["127.0.0.2"].startswith("down"), PATIENCE, words)
    cluster.start_node("127.0.0.2")
    ends(attempt)

    takes_steps()
    assert launch("cancel", str(run_folder)).returncode == 0
    wait_for(lambda: cluster.state_of(job) == "COMPLETED", PATIENCE, words)
    end = f"training.total_steps={last_step(run_folder) + 3}"
    submitted = launch("submit", *machines, *run, here, end)
    assert submitted.returncode == 0, submitted.stderr
    wait_for(lambda: cluster.state_of(submitted.stdout.strip()) == "COMPLETED", PATIENCE, words)

    # Stopped on request no step is lost, otherwise at most those since the last checkpoint.
    resumed = [event["step"] for event in marks("resume")]
    assert len(resumed) >= 5 and resumed == sorted(resumed), words()
    assert [event["step"] for event in marks("stop")][:2] == resumed[:2]
    done = run_train([*run, f"run_root={tmp_path / 'uninterrupted'}", end], processes=2)
    assert done.returncode == 0, done.stderr
    assert losses(run_folder) == losses(tmp_path / "uninterrupted" / "run")
    assert list(losses(run_folder)) == list(range(1, last_step(run_folder) + 1))
    assert "2 processes add up 1 MiB" in (run_folder / "logs" / "attempt-1" / "all-reduce.out").read_text()
    kept = json.loads((run_folder / "code.json").read_text())
    assert kept == json.loads((run_folder / "launch" / "code" / "code.json").read_text()) and kept["revision"]

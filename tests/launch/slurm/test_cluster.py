"""Runs on a real Slurm of two nodes: whatever ends an attempt, the run goes on, with the losses of one left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.folder import LaunchFolder
from tests.launch.slurm.cluster import kill, wait_for
from tests.runs import run_train
from train.callbacks.metrics_file import read_metrics
from train.run_directory import read_events, read_lines

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
MACHINES = ["nodes=2", "gpus_per_node=0", "processes_per_node=1", "launch.exclusive=false", "launch.memory=1000"]
# Of a node without much to spare.
PREFLIGHT = ["launch.preflight.free_gib=0.1", "launch.preflight.all_reduce_mib=1"]
PATIENCE = 300


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
    run = [
        "experiment=demo",
        "name=run",
        f"run_root={tmp_path}",
        f"corpus.directory={small_corpus}",
        "corpus.max_epochs=1000",
        "training.total_steps=160",
        "checkpoint.interval=10",
        "logging.interval=1",
        "logging.progress=false",
        "logging.wandb.mode=disabled",
        "evaluation=none",
    ]
    # Two minutes before the end, at most a minute after the beginning: Slurm looks at its clock twice a minute.
    time_limit = ["launch.time=00:03:00", "launch.signal_seconds=120", "launch.exclude_after=0"]
    submitted = launch("submit", *MACHINES, *PREFLIGHT, *time_limit, *run)
    assert submitted.returncode == 0, submitted.stderr
    job, words = submitted.stdout.strip(), words_of(run_folder)

    def goes_on(more_steps: int) -> None:
        """Wait until another attempt has taken steps."""
        before = len(attempts(run_folder))
        target = last_step(run_folder) + more_steps
        wait_for(lambda: len(attempts(run_folder)) >= before and last_step(run_folder) >= target, PATIENCE, words)

    def next_attempt(than: int | None = None) -> None:
        number = (len(attempts(run_folder)) if than is None else than) + 1
        wait_for(lambda: len(attempts(run_folder)) >= number, PATIENCE, words)

    # The end of the time: Slurm itself sends the signal.
    next_attempt()
    next_attempt()
    stops = [event["reason"] for event in read_events(run_folder) if event["event"] == "stop_request"]
    assert stops[:1] == ["SIGUSR1"], words()
    # Once is enough.
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=01:00:00")

    goes_on(5)
    before = len(attempts(run_folder))
    other = cluster.ask("sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "--wrap", "sleep 1").strip()
    wait_for(lambda: cluster.state_of(other) == "COMPLETED", PATIENCE, words)
    next_attempt(before)
    stops = [event["reason"] for event in read_events(run_folder) if event["event"] == "stop_request"]
    assert "SIGTERM" in stops, words()

    goes_on(5)
    (rank,) = cluster.tasks("127.0.0.2", "train")
    kill(rank)
    next_attempt()
    ended = [line for line in LaunchFolder(run_folder).history() if line["event"] == "end" and line.get("code")]
    assert (ended[-1]["rank"], ended[-1]["node"]) == (1, "127.0.0.2"), words()

    goes_on(5)
    cluster.lose_node("127.0.0.2")
    wait_for(lambda: cluster.states()["127.0.0.2"].startswith("down"), PATIENCE, words)
    cluster.start_node("127.0.0.2")
    next_attempt()

    wait_for(lambda: cluster.state_of(job) == "COMPLETED", 2 * PATIENCE, words)
    assert len(attempts(run_folder)) >= 5
    # Attempts after the first went on from a checkpoint, and lost at most the steps since it.
    resumed = [event["step"] for event in read_events(run_folder) if event["event"] == "resume"]
    assert resumed == sorted(resumed) and len(resumed) == len(attempts(run_folder)) - 1, words()

    uninterrupted = tmp_path / "uninterrupted"
    reference = [setting for setting in run if not setting.startswith("run_root")]
    done = run_train([*reference, f"run_root={uninterrupted}"], processes=2)
    assert done.returncode == 0, done.stderr
    assert len(losses(run_folder)) == 160
    assert losses(run_folder) == losses(uninterrupted / "run")
    kept = json.loads((run_folder / "code.json").read_text())
    assert kept == json.loads((run_folder / "launch" / "code" / "code.json").read_text()) and kept["revision"]

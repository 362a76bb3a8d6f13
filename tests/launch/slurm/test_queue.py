"""What is refused before submission, what ends a run for good, chains, nodes that are left out: on a real Slurm."""

from __future__ import annotations

import json
import re

import pytest

from launch.folder import LaunchFolder
from tests.launch.slurm.cluster import wait_for
from tests.launch.slurm.test_cluster import attempts, last_step, losses, words_of
from tests.runs import run_train
from train.run_directory import read_events

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
ALONE = [
    "gpus_per_node=0",
    "processes_per_node=1",
    "launch.exclusive=false",
    "launch.memory=500",
    "launch.time=01:00:00",
]
UNCHECKED = ["launch.preflight.seconds=0"]
SHORT = ["training.total_steps=6", "checkpoint.interval=2"]
LONG = ["training.total_steps=100000", "checkpoint.interval=1000"]
PATIENCE = 180


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["launch.partition=plane"], "launch.partition: no partition 'plane' (did you mean 'plain'?); choose one of"),
        (["gpus_per_node=3"], "gpus_per_node: 3 are more than the 2 that a node of partition plain has; use at most 2"),
        (["nodes=3", "training.global_batch_size=6"], "nodes: 3 are more than the 2 of partition plain; use at most 2"),
        (["launch.account=lab"], "launch.account: this cluster keeps no accounts (lab); set launch.account=null"),
        (
            ["launch.time=2-00:00:00"],
            "launch.time: 2-00:00:00 is longer than partition plain allows; use at most 2:00:00",
        ),
        (["launch.constraint=h300"], "launch: Slurm refuses the job (sbatch: allocation failure: Invalid feature"),
        (["nodes=2", "parallel.pipeline=3"], "parallel.pipeline: 2 processes do not divide into replicas of 3 stages"),
    ],
)
def test_what_the_cluster_has_no_place_for_is_refused(launch, tiny_run, run_folder, settings, problem):
    # One GPU or none: a count of processes that the batch divides into.
    own = [setting for setting in ALONE if not any(given.split("=")[0] == setting.split("=")[0] for given in settings)]
    refused = launch("submit", *own, *tiny_run, *SHORT, *settings)
    assert refused.returncode == 2 and problem in refused.stderr, refused.stderr
    assert not run_folder.exists()


def test_a_run_from_its_submission_to_its_end(cluster, launch, tiny_run, tmp_path, run_folder):
    tested = launch("submit", "--test-only", *ALONE, *tiny_run, *SHORT)
    assert tested.returncode == 0 and "to start at" in tested.stdout and not run_folder.exists(), tested.stderr
    # One process for each GPU, which no process looks for here.
    machines = ["nodes=2", "gpus_per_node=1", *ALONE[2:]]
    submitted = launch("submit", *machines, *UNCHECKED, *tiny_run, *SHORT)
    assert submitted.returncode == 0, submitted.stderr
    again = launch("submit", *machines, *UNCHECKED, *tiny_run, *SHORT)
    assert again.returncode == 2 and "is in the queue already, as job" in again.stderr
    job, words = submitted.stdout.strip(), words_of(run_folder)
    wait_for(lambda: cluster.state_of(job) == "COMPLETED", PATIENCE, words)
    status = launch("status", str(tmp_path))
    assert f"{job} COMPLETED" in status.stdout and "6/6" in status.stdout and "complete 6" in status.stdout
    (found,) = json.loads(launch("status", str(run_folder), "--json").stdout)
    assert (found["state"], found["steps"], found["attempts"], found["verdict"]) == (
        "complete", 6, 1, "the run is complete",
    )  # fmt: skip
    assert "Complete: 6 steps" in launch("logs", str(run_folder), "--rank", "0").stdout
    assert f"attempt 1 of job {job}" in launch("logs", str(run_folder)).stdout
    absent = launch("logs", str(run_folder), "--rank", "7")
    assert absent.returncode == 2 and "no rank 7; there are 0 to 1" in absent.stderr
    reference = [setting for setting in tiny_run if not setting.startswith("run_root")]
    assert run_train([*reference, f"run_root={tmp_path / 'alone'}", *SHORT], processes=2).returncode == 0
    assert losses(run_folder) == losses(tmp_path / "alone" / "run")
    # The folder belongs to this run: another configuration is refused with what differs, a longer one is told.
    other = launch("submit", *ALONE, *tiny_run, *SHORT, "seed=5", "model.d_model=64")
    assert other.returncode == 2 and "started with another value (0, now 5)" in other.stderr
    assert "model.d_model" in other.stderr and "(32, now 64)" in other.stderr
    longer = launch("submit", "--dry-run", *ALONE, *tiny_run, *SHORT, "training.total_steps=8")
    assert longer.returncode == 0 and "changed    training.total_steps: 6 -> 8" in longer.stderr


def test_a_cancelled_run_saves_and_goes_on_when_it_is_submitted_again(cluster, launch, tiny_run, run_folder):
    submitted = launch("submit", *ALONE, *UNCHECKED, *tiny_run, *LONG)
    assert submitted.returncode == 0, submitted.stderr
    job, words = submitted.stdout.strip(), words_of(run_folder)
    wait_for(lambda: last_step(run_folder) > 3, PATIENCE, words)
    assert launch("cancel", str(run_folder)).returncode == 0
    wait_for(lambda: cluster.state_of(job) == "COMPLETED", PATIENCE, words)
    # The run knows the end of its time, also from a Slurm that does not say it.
    told = "".join(path.read_text() for path in (run_folder / "logs").rglob("*") if path.is_file())
    assert re.search(r"SIGUSR1: .* in the \d{3,} s that are left, and ends", told), told
    (stop,) = [event["step"] for event in read_events(run_folder) if event["event"] == "stop"]
    end = f"training.total_steps={stop + 2}"
    again = launch("submit", *ALONE, *UNCHECKED, *tiny_run, *LONG, end)
    assert again.returncode == 0, again.stderr
    wait_for(lambda: cluster.state_of(again.stdout.strip()) == "COMPLETED", PATIENCE, words)
    assert [event["step"] for event in read_events(run_folder) if event["event"] == "resume"] == [stop]
    assert last_step(run_folder) == stop + 2
    assert "no job of it waits or runs" in launch("cancel", str(run_folder)).stderr


def test_a_run_that_always_fails_is_given_up(cluster, launch, tiny_run, run_folder):
    cap = "launch.attempts_without_progress=2"
    submitted = launch("submit", *ALONE, *UNCHECKED, cap, *tiny_run, *SHORT, "launch.options=['--hold']")
    assert submitted.returncode == 0, submitted.stderr
    job, words = submitted.stdout.strip(), words_of(run_folder)
    code = LaunchFolder(run_folder).code / "train" / "trainer.py"
    code.write_text(code.read_text() + "\nraise RuntimeError('a fault in the code')\n")
    cluster.ask("scontrol", "release", job)
    wait_for(lambda: cluster.state_of(job) == "FAILED", PATIENCE, words)
    assert len(attempts(run_folder)) == 2
    status = launch("status", str(run_folder)).stdout
    assert "given up after 2 attempts without a new checkpoint since its beginning" in status
    assert "rank 0 on node 127.0.0.1" in status, status


def test_a_chain_goes_on_without_requeue_and_ends_with_the_run(cluster, launch, tiny_run, run_folder):
    chain = ["launch.continuation=chain", "launch.chain=3"]
    # Long enough to be interrupted; the second job makes it short.
    submitted = launch("submit", *ALONE, *UNCHECKED, *chain, *tiny_run, *LONG)
    assert submitted.returncode == 0, submitted.stderr
    jobs, words = LaunchFolder(run_folder).job_numbers(), words_of(run_folder)
    assert len(jobs) == 3 and submitted.stdout.strip() == jobs[0]
    wait_for(lambda: last_step(run_folder) > 3, PATIENCE, words)
    assert cluster.state_of(jobs[1]) == "PENDING"
    cluster.ask("scancel", "--signal=USR1", jobs[0])
    wait_for(lambda: cluster.state_of(jobs[0]) == "COMPLETED", PATIENCE, words)
    (stop,) = [event["step"] for event in read_events(run_folder) if event["event"] == "stop"]
    configuration = LaunchFolder(run_folder).config
    text = configuration.read_text()
    configuration.write_text(text.replace("total_steps: 100000", f"total_steps: {stop + 2}"))
    wait_for(lambda: cluster.state_of(jobs[1]) in ("COMPLETED", "FAILED"), PATIENCE, words)
    wait_for(lambda: cluster.state_of(jobs[2]) == "CANCELLED", PATIENCE, words)
    assert cluster.state_of(jobs[1]) == "COMPLETED", words()
    assert [attempt["job"] for attempt in attempts(run_folder)] == jobs[:2]


def test_an_unfit_node_is_left_out(cluster, launch, tiny_run, run_folder):
    checked = ["launch.preflight.free_gib=0.1", "launch.preflight.all_reduce_mib=0"]
    submitted = launch("submit", *ALONE, *checked, *tiny_run, *SHORT, "launch.options=['--hold']")
    assert submitted.returncode == 0, submitted.stderr
    job, words = submitted.stdout.strip(), words_of(run_folder)
    # Nothing is wrong with the nodes of this machine.
    check = LaunchFolder(run_folder).preflight
    hums = '[ "$node" != 127.0.0.1 ] || problem "it hums"\necho checked'
    check.write_text(check.read_text().replace("echo checked", hums))
    cluster.ask("scontrol", "release", job)
    wait_for(lambda: cluster.state_of(job) == "COMPLETED", PATIENCE, words)
    assert [attempt["nodes"] for attempt in attempts(run_folder)] == [["127.0.0.1"], ["127.0.0.2"]], words()
    unfit = [line["nodes"] for line in LaunchFolder(run_folder).history() if line["event"] == "unfit"]
    assert unfit == [{"127.0.0.1": "it hums"}]


def test_a_job_that_somebody_cancels_by_hand_stays_cancelled(cluster, launch, tiny_run, run_folder):
    submitted = launch("submit", *ALONE, *UNCHECKED, *tiny_run, *LONG)
    assert submitted.returncode == 0, submitted.stderr
    job, words = submitted.stdout.strip(), words_of(run_folder)
    wait_for(lambda: last_step(run_folder) > 3, PATIENCE, words)
    cluster.ask("scancel", job)
    # Its processes save all the same; the script has then to see that they were not asked to for the sake of others.
    wait_for(lambda: "or Slurm has queued it again" in words() or cluster.state_of(job) == "CANCELLED", PATIENCE, words)
    wait_for(lambda: not cluster.ask("squeue", "-h", "-j", job, "-t", "COMPLETING").strip(), PATIENCE, words)
    assert cluster.state_of(job) == "CANCELLED", words()
    assert [event["reason"] for event in read_events(run_folder) if event["event"] == "stop"] == ["SIGTERM"]


def test_a_run_whose_time_is_over_before_it_was_told_goes_on(cluster, launch, tiny_run, run_folder):
    """Slurm does not queue such a job again by itself."""
    # The signal before goes where nobody listens.
    short = ["launch.time=00:01:00", "launch.signal_seconds=1", "launch.options=['--signal=B:URG@1']"]
    submitted = launch("submit", *ALONE, *UNCHECKED, *short, *tiny_run, *LONG)
    assert submitted.returncode == 0, submitted.stderr
    job, words = submitted.stdout.strip(), words_of(run_folder)
    wait_for(lambda: len(attempts(run_folder)) == 2, PATIENCE, words)
    before = last_step(run_folder)
    wait_for(lambda: last_step(run_folder) > before, PATIENCE, words)
    assert "DUE TO TIME LIMIT" in (run_folder / "logs" / f"slurm-{job}.out").read_text()
    assert launch("cancel", str(run_folder), "--now").returncode == 0
    wait_for(lambda: cluster.state_of(job) == "CANCELLED", PATIENCE, words)

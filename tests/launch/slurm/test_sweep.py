"""A sweep on a real Slurm of two nodes: planned, submitted, killed half-way, continued, collected, fitted, drawn."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from launch.folder import LaunchFolder
from launch.scaling.runs import read_runs
from launch.sweep.manifest import SweepFolder, read_manifest
from tests.launch.slurm.cluster import wait_for
from tests.launch.slurm.test_cluster import last_step, words_of
from tests.launch.sweep.sweeps import sweep_of
from tests.runs import environment

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
PATIENCE = 900
UNCHECKED = ["launch.preflight.seconds=0", "launch.time=01:00:00"]
# Five sizes of two families at two budgets: what L(N, D) needs.
SIZES = ", ".join(
    f"{{d_model: {width}, n_blocks: {depth}}}" for width, depth in ((16, 1), (32, 1), (32, 2), (48, 2), (64, 2))
)
TWENTY = [f"sweep.sizes=[{SIZES}]", "sweep.budgets=[1.0e9, 4.0e9]", "sweep.least_steps=4"]


def rows_of(launch, folder) -> dict[str, dict]:
    done = launch("sweep", "status", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    return {row["row"]: row for row in json.loads(done.stdout)}


def states(launch, folder) -> list[str]:
    return [row["row_state"] for row in rows_of(launch, folder).values()]


def test_a_sweep_is_killed_half_way_continued_collected_and_fitted(cluster, launch, small_corpus, tmp_path):
    folder = SweepFolder(tmp_path / "tiny")
    planned = launch("sweep", "plan", *sweep_of(tmp_path, small_corpus, *UNCHECKED, *TWENTY))
    assert planned.returncode == 0, planned.stderr
    manifest = read_manifest(folder)
    assert len(manifest.rows) == 20
    tested = launch("sweep", "submit", str(folder.path), "--test-only")
    assert tested.returncode == 0 and "to start at" in tested.stdout and not folder.runs.exists(), tested.stderr

    submitted = launch("sweep", "submit", str(folder.path), "--at-once", "3")
    assert submitted.returncode == 0, submitted.stderr
    array = submitted.stdout.strip()
    again = launch("sweep", "submit", str(folder.path))
    assert again.returncode == 0 and "0 runs are submitted" in again.stderr, again.stderr

    def words() -> str:
        last = launch("sweep", "status", str(folder.path)).stdout
        return last + "".join(words_of(folder.run(row))() for row in manifest.rows[:3])

    wait_for(lambda: states(launch, folder.path).count("done") >= 5, PATIENCE, words)
    # All jobs are gone at once, those that run included.
    cluster.ask("scancel", "--signal=KILL", "--full", array)
    cluster.ask("scancel", array)
    wait_for(lambda: not cluster.ask("squeue", "-h", "-j", array).strip(), PATIENCE, words)
    found = states(launch, folder.path)
    assert 5 <= found.count("done") < 20 and set(found) <= {"done", "waiting", "failed"}, found
    complete = [row.name for row, state in zip(manifest.rows, found, strict=True) if state == "done"]
    before = {name: (folder.run(name) / "events.jsonl").read_bytes() for name in complete}

    continued = launch("sweep", "submit", str(folder.path))
    assert continued.returncode == 0 and f"{20 - len(complete)} runs are submitted" in continued.stderr, (
        continued.stderr
    )
    wait_for(lambda: states(launch, folder.path) == ["done"] * 20, PATIENCE, words)
    # Holes only: what was complete was not touched.
    assert before == {name: (folder.run(name) / "events.jsonl").read_bytes() for name in complete}
    assert continued.stdout.strip() != array

    assert launch("sweep", "collect", str(folder.path)).returncode == 0
    table = read_runs([folder.path / "runs.csv"])
    assert len(table.used) == 20 and {run.family for run in table.used} == {"xlstm", "llama"}
    assert {run.budget for run in table.used} == {1e9, 4e9}
    fitted = launch(
        "sweep", "fit", str(folder.path / "runs.csv"), "--output", str(folder.path / "fit"), "--resamples", "20"
    )
    assert fitted.returncode == 0 and "alpha" in fitted.stdout, fitted.stderr
    page = (folder.path / "fit" / "scaling.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4 and "All 20 runs" in page
    predicted = launch("sweep", "predict", str(folder.path / "fit"), "--flops", "4e9")
    assert predicted.returncode == 0 and "parameters" in predicted.stdout, predicted.stderr


def test_an_element_of_an_array_goes_on_by_itself_and_branches_wait_for_their_trunk(
    cluster, launch, small_corpus, tmp_path
):
    folder = SweepFolder(tmp_path / "tiny")
    reuse = ["sweep.reuse={decay: 0.2}", "sweep.budgets=[2.0e10, 1.0e11]", "~sweep.families.llama"]
    planned = launch("sweep", "plan", *sweep_of(tmp_path, small_corpus, *UNCHECKED, *reuse, "logging.interval=1"))
    assert planned.returncode == 0, planned.stderr
    manifest = read_manifest(folder)
    trunk, *branches = manifest.rows
    submitted = launch("sweep", "submit", str(folder.path))
    assert submitted.returncode == 0, submitted.stderr
    first, second = submitted.stdout.split()
    words = words_of(folder.run(trunk))
    wait_for(lambda: last_step(folder.run(trunk)) > 3, PATIENCE, words)
    assert [row["row_state"] for row in rows_of(launch, folder.path).values()] == ["running", "queued", "queued"]
    assert "(Dependency)" in rows_of(launch, folder.path)[branches[0].name]["queue"]
    cluster.ask("scancel", "--signal=USR1", f"{first}_0")
    wait_for(lambda: states(launch, folder.path) == ["done"] * 3, PATIENCE, words)
    # One attempt more of the element that was told to save, and of no other.
    attempts = [rows_of(launch, folder.path)[row.name]["attempts"] for row in manifest.rows]
    assert attempts == [2, 1, 1], words()
    assert LaunchFolder(folder.run(branches[0])).job_numbers() == [f"{second}_1"]
    assert f"attempt 2 of job {first}_0" in launch("logs", str(folder.run(trunk))).stdout


def test_a_submission_that_was_killed_behind_sbatch_is_not_made_twice(cluster, launch, small_corpus, tmp_path):
    folder = SweepFolder(tmp_path / "tiny")
    held = ["launch.options=['--hold']"]
    planned = launch("sweep", "plan", *sweep_of(tmp_path, small_corpus, *UNCHECKED, *held))
    assert planned.returncode == 0, planned.stderr
    # Its second sbatch, behind the one that only asks, queues the array; then the process is gone.
    killed = (
        "import os, sys; from launch import slurm; from launch.__main__ import main; submit = slurm.submit\n"
        "slurm.submit = lambda *given: (submit(*given), os.kill(os.getpid(), 9))\n"
        "main(sys.argv[1:])"
    )
    variables = environment() | {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
    command = [sys.executable, "-c", killed, "sweep", "submit", str(folder.path)]
    assert subprocess.run(command, env=variables, cwd=tmp_path, timeout=300).returncode == -9
    again = launch("sweep", "submit", str(folder.path))
    assert again.returncode == 0 and "was queued by a command that was interrupted" in again.stderr, again.stderr
    assert "0 runs are submitted" in again.stderr and states(launch, folder.path) == ["queued"] * 4
    (array,) = {row["jobs"][0]["number"].partition("_")[0] for row in rows_of(launch, folder.path).values()}
    # A run of it is cancelled like any other; then the array.
    run = folder.run(read_manifest(folder).rows[0])
    assert launch("cancel", str(run)).returncode == 0
    assert states(launch, folder.path) == ["waiting", *["queued"] * 3]
    assert launch("cancel", str(folder.path)).stderr.count("is cancelled") == 3
    assert states(launch, folder.path) == ["waiting"] * 4
    assert "no job of it waits or runs" in launch("cancel", str(folder.path)).stderr


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["launch.partition=plane"], "launch.partition: no partition 'plane' (did you mean 'plain'?)"),
        (["nodes=3"], "nodes: 3 are more than the 2 of partition plain"),
    ],
)
def test_what_the_cluster_has_no_place_for_is_refused(launch, small_corpus, tmp_path, settings, problem):
    folder = SweepFolder(tmp_path / "tiny")
    # A batch that divides among three processes.
    settings = [*settings, "sweep.batch_tokens.value=384"]
    planned = launch("sweep", "plan", *sweep_of(tmp_path, small_corpus, *UNCHECKED, *settings))
    assert planned.returncode == 0, planned.stderr
    refused = launch("sweep", "submit", str(folder.path))
    assert refused.returncode == 2 and problem in refused.stderr, refused.stderr
    assert not folder.runs.exists() and not folder.submissions.exists()

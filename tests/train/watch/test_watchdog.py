"""A rank that fails, dies or does not move ends the run of all, named, with what it did: real processes over gloo."""

import contextlib
import json
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.runs import PATIENCE, ROOT, TINY_RUN, environment, run_script, run_train, train_command
from train.checkpoints.layout import MARKER
from train.run_directory import read_events
from train.watch.ends import End

TROUBLED = ROOT / "tests" / "train" / "watch" / "troubled_train.py"
# Far below the time after which a collective that does not finish ends a run.
SECONDS = 5
# Like others that `make test` runs.
MORE = pytest.mark.layouts


@pytest.fixture
def settings(small_corpus, tmp_path):
    return [
        f"run_root={tmp_path}",
        f"corpus.directory={small_corpus}",
        *TINY_RUN,
        "name=run",
        "training.total_steps=6",
        "checkpoint.interval=2",
        f"watchdog.seconds={SECONDS}",
    ]


def ends(folder: Path) -> dict[int, End]:
    found = [End.from_json(json.loads(path.read_text())) for path in folder.glob("logs/*.end.json")]
    return {end.rank: end for end in found}


def failure(folder: Path) -> dict:
    """The one event that says why the run failed."""
    (event,) = [event for event in read_events(folder) if event["event"] == "error"]
    return event


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "kind", "words"),
    [
        (0, "stop", "has not answered for"),
        (1, "sleep", "has not moved for"),
        pytest.param(1, "stop", "has not answered for", marks=MORE),
        pytest.param(0, "sleep", "has not moved for", marks=MORE),
    ],
)
def test_a_rank_that_hangs_is_named_with_its_phase_and_stack(settings, tmp_path, rank, kind, words):
    begun = time.monotonic()
    done = run_script(TROUBLED, [str(rank), kind, "3", *settings], processes=2)
    assert done.returncode == 1
    assert time.monotonic() - begun < 300, "the timeout of collectives is 1,800 s"
    event = failure(tmp_path / "run")
    assert event["rank"] == rank and event["kind"] == "hang"
    assert f"rank {rank} (process {event['process']} on {event['host']}) {words}" in event["message"]
    # Of a process that stands still the last is known that it said.
    assert "in train_step" in event["stack"] or kind == "stop"
    assert event["position"] == "'data' of step 3" or kind == "stop"
    assert done.stderr.count("the run ends. Where every rank was") == 1 and event["message"] in done.stderr
    assert "Traceback" not in done.stderr
    found = ends(tmp_path / "run")
    assert found[1 - rank].because_of == rank and found[rank].because_of is None
    for one in (0, 1):
        log = (tmp_path / "run" / "logs" / f"rank-{one:05d}.log").read_text()
        assert "in train_step" in log
        # The other one, or one that was stopped, may find its peer gone before its watchdog ends it.
        assert ("This rank ends" in log and "Current thread" in log) or (kind, one) != ("sleep", rank)
    # Of NCCL's collectives; gloo's are told from the frames of threads.
    assert not list((tmp_path / "run" / "logs").glob("nccl-*")) and "Collectives" not in log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "processes", "layout"),
    [
        (1, 2, "parallel.sequence=2"),
        pytest.param(1, 2, "parallel.pipeline=2", marks=MORE),
        pytest.param(1, 2, "parallel=zero3", marks=MORE),
        pytest.param(1, 4, "parallel.pipeline=2 parallel.sequence=2", marks=MORE),
        pytest.param(2, 4, "parallel.sequence=2", marks=MORE),
        pytest.param(3, 4, "parallel.pipeline=2", marks=MORE),
    ],
)
def test_of_ranks_in_one_phase_the_one_is_named_that_is_waited_for(settings, tmp_path, rank, processes, layout):
    arguments = [str(rank), "sleep:forward", "3", *settings, *layout.split()]
    assert run_script(TROUBLED, arguments, processes=processes).returncode == 1
    event = failure(tmp_path / "run")
    assert (event["rank"], event["kind"]) == (rank, "hang") and "forward" in event["position"]
    assert "in _sleep" in event["stack"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [pytest.param(0, marks=MORE), 1])
def test_an_exception_of_any_class_ends_all_ranks_and_is_told_by_the_one_that_raised_it(settings, tmp_path, rank):
    done = run_script(TROUBLED, [str(rank), "raise", "3", *settings], processes=2)
    assert done.returncode == 1
    event = failure(tmp_path / "run")
    assert (event["rank"], event["kind"]) == (rank, "error") and "of no class that is expected" in event["message"]
    assert "in _raise" in event["stack"] and event["position"] == "'data' of step 3"
    found = ends(tmp_path / "run")
    assert found[rank].because_of is None and "in _raise" in found[rank].stack
    assert found[1 - rank].because_of == rank
    assert f"train: rank {1 - rank}: this rank ends because" in done.stderr
    assert "in _raise" in (tmp_path / "run" / "logs" / f"rank-{rank:05d}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "kind"),
    [(0, "kill"), (1, "abort"), pytest.param(1, "kill", marks=MORE), pytest.param(0, "abort", marks=MORE)],
)
def test_a_rank_that_dies_without_a_word_is_named_by_the_one_that_is_left(settings, tmp_path, rank, kind):
    done = run_script(TROUBLED, [str(rank), kind, "3", *settings], processes=2)
    assert done.returncode == 1
    event = failure(tmp_path / "run")
    assert (event["rank"], event["kind"]) == (rank, "gone") and "is gone without a word" in event["message"]
    assert ends(tmp_path / "run").keys() == {1 - rank}
    # By the thread that trains, or by the watchdog's where a collective waits on: gloo may notice late.
    told = [line for line in done.stderr.splitlines() if line.startswith("train: ")]
    assert any(f"rank {rank} (process {event['process']}" in line and "is gone without a word" in line for line in told)
    if kind == "abort":
        log = (tmp_path / "run" / "logs" / f"rank-{rank:05d}.log").read_text()
        assert "Fatal Python error: Aborted" in log and "troubled_train.py" in log


@pytest.mark.slow
def test_a_process_alone_that_hangs_ends_with_its_stack(settings, tmp_path):
    done = run_script(TROUBLED, ["0", "sleep", "3", *settings])
    assert done.returncode == 1
    assert "rank 0" in failure(tmp_path / "run")["message"] and "has not moved for" in done.stderr
    assert "in _sleep" in (tmp_path / "run" / "logs" / "rank-00000.log").read_text()


@pytest.mark.slow
def test_the_next_start_says_how_one_that_was_killed_ended(settings, tmp_path):
    done = run_script(TROUBLED, ["0", "kill", "3", *settings])
    assert done.returncode == -9
    assert not [event for event in read_events(tmp_path / "run") if event["event"] == "error"]
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy" / "run")
    done = run_train(settings)
    assert done.returncode == 0 and "The start before this one ended: without a word of any rank" in done.stderr
    assert not ends(tmp_path / "run")
    kinds = [event["event"] for event in read_events(tmp_path / "run")]
    assert kinds.index("error") < kinds.index("resume") and failure(tmp_path / "run")["found_by"] == "the next start"
    # What a rank could write, but not put among the events, is what the next start tells.
    (attempt,) = [event["attempt"] for event in read_events(copy) if event["event"] == "start"]
    told = End(attempt, 1, 7, "node-3", 5.0, "error", "its disk is gone", "", "'save' of step 2")
    later = End(attempt, 0, 6, "node-2", 9.0, "error", "a collective failed", "", "'reduce' of step 3")
    for end in (later, told):
        (copy / "logs" / f"rank-{end.rank:05d}.end.json").write_text(end.as_json())
    done = run_train([*settings, f"run_root={copy.parent}"])
    assert done.returncode == 0 and "The start before this one ended: its disk is gone." in done.stderr
    assert failure(copy)["rank"] == 1 and not list((copy / "logs").glob("*.end.json"))


@pytest.mark.slow
@MORE
def test_a_run_whose_launcher_is_killed_saves_and_stops(settings, tmp_path):
    command = train_command([*settings, "training.total_steps=100000", "watchdog.seconds=1"], processes=2)
    launcher = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)
    ranks = []
    try:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "run" / "checkpoints" / "step-00000002").exists():
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        ranks = psutil.Process(launcher.pid).children()
        launcher.kill()
        gone, alive = psutil.wait_procs(ranks, timeout=PATIENCE)
        assert len(gone) == 2 and not alive
    finally:
        for process in (launcher, *ranks):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        launcher.wait()
    last = read_events(tmp_path / "run")[-1]
    assert (last["event"], last["reason"]) == ("stop", "the launcher is gone")
    assert (tmp_path / "run" / "checkpoints" / f"step-{last['step']:08d}" / MARKER).is_file()

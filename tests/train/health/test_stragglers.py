"""A rank that holds the others up is named, with its phase; where all are equally fast nobody is."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.documented import has_type, keys_and_types, table
from tests.runs import PATIENCE, ROOT, TINY_RUN, environment, run_script, train_command
from train.callbacks.metrics_file import read_metrics
from train.health.stragglers import Lag, Persistent, compared_phases, lags
from train.run_directory import read_lines
from train.watch.whereabouts import BETWEEN_STEPS, DATA, FORWARD, REDUCE

TROUBLED = ROOT / "tests" / "train" / "watch" / "troubled_train.py"
PHASES = (DATA, FORWARD, BETWEEN_STEPS)
# Like others that `make test` runs.
MORE = pytest.mark.layouts


def test_the_rank_and_the_phase_that_the_others_wait_for():
    own = {rank: {DATA: 0.1, FORWARD: 1.0, REDUCE: 5.0} for rank in range(4)}
    assert all(lag.seconds == 0 for lag in lags(own, PHASES))
    own[2] = {DATA: 0.1, FORWARD: 1.5, REDUCE: 0.0, BETWEEN_STEPS: 0.25}
    first, *others = lags(own, PHASES)
    assert first == Lag(2, 0.75, FORWARD)
    # One that is slow is no reason to name those it is compared with.
    assert all(lag.seconds == 0 for lag in others)
    assert lags({0: own[0]}, PHASES) == []


def test_of_two_ranks_each_is_compared_with_the_other():
    assert lags({0: {DATA: 0.2}, 1: {DATA: 0.5}}, PHASES) == [Lag(1, 0.3, DATA), Lag(0, -0.3, FORWARD)]


def test_phases_in_which_ranks_wait_for_each_other_are_not_compared():
    assert FORWARD in compared_phases(zero_stage=1, stages=1)
    assert FORWARD not in compared_phases(zero_stage=3, stages=1)
    assert FORWARD not in compared_phases(zero_stage=1, stages=2)


def test_what_is_so_for_long_enough_is_told_once_until_it_ends():
    persistent = Persistent(2)
    looks = [["a"], ["a", "b"], ["a"], [], ["a"], ["a"], ["a"]]
    assert [persistent.new(found) for found in looks] == [[], ["a"], [], [], [], ["a"], []]


@pytest.fixture
def settings(small_corpus, tmp_path):
    return [
        f"run_root={tmp_path}",
        f"corpus.directory={small_corpus}",
        *TINY_RUN,
        "name=run",
        "logging.interval=20",
        "watchdog.seconds=5",
        "health.window_seconds=0.5",
        "health.straggler_windows=2",
        # Beside busy processes a pass takes a tenth of a second more or less.
        "health.straggler_share=0.3",
    ]


def told(folder, event="straggler"):
    return [line for line in read_lines(folder / "events.jsonl") if line["event"] == event]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "kind", "phase", "layout"),
    [
        pytest.param(1, "lag", "data", [], marks=MORE),
        (0, "lag:forward", "forward", ["parallel.sequence=2", "training.micro_batch_size=8"]),
        pytest.param(1, "lag:forward", "forward", ["parallel.zero_stage=2", "training.micro_batch_size=4"], marks=MORE),
    ],
)
def test_a_slow_rank_is_named(settings, tmp_path, rank, kind, phase, layout):
    arguments = [str(rank), kind, "2", *settings, "training.total_steps=20", *layout]
    done = run_script(TROUBLED, arguments, processes=2)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    event = told(folder)[0]
    assert all((one["rank"], one["phase"]) == (rank, phase) for one in told(folder))
    documented = keys_and_types([row for row in table("training.md", "event") if row[0] == "`straggler`"])
    assert event.keys() - {"time", "event"} == documented.keys()
    assert 0.1 < event["lag_seconds"] < event["step_seconds"]
    words = f"WARNING    rank {rank} on {event['host']} holds the others up: "
    assert words in done.stderr and f"most of them in '{phase}'" in done.stderr
    alerts = [line for line in told(folder, "alert") if line["rule"] == "straggler"]
    assert len(alerts) == len(told(folder)) and alerts[0]["words"].startswith(f"rank {rank} on")
    lines = [line for line in read_metrics(folder) if line["kind"] == "health"]
    documented = keys_and_types(table("training.md", 'key of `kind: "health"`'))
    for line in lines:
        assert line.keys() - {"kind", "step"} == documented.keys()
        assert all(has_type(line[key], words) for key, words in documented.items()), line
    assert lines[-1]["slowest_rank"] == rank and lines[-1]["lag_fraction"] > 0.2


@pytest.mark.slow
def test_nobody_is_named_where_all_are_slow(settings, tmp_path):
    done = run_script(
        TROUBLED,
        ["-1", "lag:forward", "2", *settings, "training.total_steps=16", "training.micro_batch_size=4"],
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    assert not told(tmp_path / "run") and "holds the others up" not in done.stderr
    assert [line for line in read_metrics(tmp_path / "run") if line["kind"] == "health"]


@pytest.mark.slow
@MORE
def test_a_process_that_is_stopped_again_and_again_is_named(settings, tmp_path):
    # In whatever phase that finds it: of those that are not compared a part is left.
    command = train_command([*settings, "training.total_steps=100000", "watchdog.seconds=60"], processes=2)
    launcher = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE
        while not told(tmp_path / "run", "start"):
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        (slow,) = [one for one in psutil.Process(launcher.pid).children() if one.environ().get("RANK") == "1"]
        while not told(tmp_path / "run"):
            assert launcher.poll() is None and time.monotonic() < deadline
            os.kill(slow.pid, signal.SIGSTOP)
            time.sleep(0.2)
            os.kill(slow.pid, signal.SIGCONT)
            time.sleep(0.02)
        assert told(tmp_path / "run")[0]["rank"] == 1
    finally:
        children = psutil.Process(launcher.pid).children()
        for process in (launcher, *children):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        launcher.wait()


def test_the_clock_costs_a_step_next_to_nothing():
    """Marks of a step of 8 micro-batches with 100 collectives: below 2 ms of host time, beside busy processes too."""
    code = (
        "import time; from train.watch.phase_clock import PhaseClock\n"
        "def step(clock):\n"
        "    for phase in ('data', 'reduce', *('forward', 'backward') * 8, 'reduce', 'step', 'between steps'):\n"
        "        clock.enter(phase)\n"
        "    for _ in range(100):\n"
        "        with clock.waiting(): pass\n"
        "clock = PhaseClock(); best = 1.0\n"
        "for _ in range(100):\n"
        "    begun = time.perf_counter(); step(clock); best = min(best, time.perf_counter() - begun)\n"
        "print(best)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0 and float(done.stdout) < 2e-3, done.stderr

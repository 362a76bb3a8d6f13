"""A run that is told to stop leaves out a save that it could not finish, and says so."""

import json
import time

import pytest

from tests.runs import ROOT, run_script
from tests.train.checkpoints.test_resume import events
from train.deadline import Deadline

SLOW = ROOT / "tests" / "train" / "checkpoints" / "slow_saves.py"
# That a save is said to have taken: no wait of a test depends on how fast the machine is.
LONG = 1000.0


@pytest.fixture
def stop(tiny_run, tmp_path):
    """Run until the signal at step 4, and so to step 5: the checkpoint of step 4 is there, or is being written."""

    def run(*overrides, seconds=LONG, processes=1, rank=0, save="there", **variables):
        arguments = [str(seconds), str(rank), save, *tiny_run, "checkpoint.interval=2", "training.total_steps=500"]
        arguments += [f"parallel=zero{processes - 1}", *overrides]
        done = run_script(SLOW, arguments, processes=processes, **variables)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
        return done.stderr, names, events(tmp_path / "run", "save_skipped")

    return run


def check_skipped(said, event, checkpoint, left):
    assert event["step"] == 5 and event["seconds_left"] <= left < event["seconds_needed"]
    shown = f"{max(0.0, event['seconds_left']):g} s are left"
    assert f"WARNING    step 5 is not saved: {shown} (preemption.seconds_left, or the time of the job)" in said
    assert f"took up to {event['seconds_needed']:g} s. The run goes on from {checkpoint}" in said
    assert "Stopped by SIGTERM after step 5; the same command resumes." in said


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "rank"), [pytest.param(1, 0, marks=pytest.mark.long), (2, 1)])
def test_a_save_that_does_not_fit_is_left_out_and_the_next_start_goes_on(processes, rank, stop, tmp_path):
    where = {"processes": processes, "rank": rank}
    said, names, (event,) = stop(f"preemption.seconds_left={LONG / 2}", **where)
    assert names == ["step-00000002", "step-00000004"]
    check_skipped(said, event, "step-00000004", LONG / 2)
    assert event["seconds_needed"] == LONG
    if rank == 0:
        assert ", saves a checkpoint, if that can be done in the 500 s that are left, and ends" in said
    assert events(tmp_path / "run", "stop")[-1]["reason"] == "SIGTERM"
    # How long saves took is in the checkpoint: the next start has made none and knows.
    known = json.loads((tmp_path / "run" / "checkpoints" / names[1] / "state.json").read_text())["callbacks"]
    seconds = known["Checkpointing"]["seconds"]
    assert seconds[0] == LONG and len(seconds) == 2
    assert events(tmp_path / "run", "save")[0]["seconds"] <= seconds[1] < 600
    said, names, found = stop("preemption.seconds_left=300", "checkpoint.interval=0", seconds=0, **where)
    assert "Resuming 'run' from step-00000004" in said and len(found) == 2
    check_skipped(said, found[1], "step-00000004", 300)


@pytest.mark.slow
def test_a_save_that_fits_is_made(stop):
    # The end of a Slurm job that is past was moved on since: the variable stays as it was.
    past = str(int(time.time()) - 100)
    said, names, found = stop(f"preemption.seconds_left={LONG + 600}", SLURM_JOB_END_TIME=past)
    assert names[-1] == "step-00000005" and found == []
    assert "if that can be done in the 1600 s that are left" in said


@pytest.mark.slow
@pytest.mark.long
def test_the_save_under_way_is_waited_for_where_that_is_enough(stop):
    # That of step 5 would come behind it.
    said, names, (event,) = stop(f"preemption.seconds_left={1.5 * LONG}", save="near")
    assert names == ["step-00000002", "step-00000004"]
    check_skipped(said, event, "step-00000004", 1.5 * LONG)
    assert LONG < event["seconds_needed"] < 2 * LONG


@pytest.mark.slow
def test_the_save_under_way_is_given_up_where_it_is_too_late(stop):
    end = str(int(time.time() + LONG / 2))
    said, names, (event,) = stop(save="far", SLURM_JOB_END_TIME=end)
    # That of step 4 is left as it was.
    assert names[0] == "step-00000002" and len(names) == 2 and names[1].startswith("step-00000004.")
    check_skipped(said, event, "step-00000002", LONG / 2)
    said, names, _ = stop(seconds=0)
    assert "Resuming 'run' from step-00000002" in said
    assert names == ["step-00000002", "step-00000004", "step-00000005"]


def test_the_earlier_end_counts_and_a_past_one_is_none(monkeypatch):
    assert Deadline(None).left() is None
    deadline = Deadline(3000.0)
    deadline.request(seconds_ago=1000.0)
    # Another request changes nothing.
    deadline.request()
    assert 1900.0 < deadline.left() <= 2000.0
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1500))
    assert 1400.0 < Deadline(None).left() <= 1500.0 and 1400.0 < Deadline(6000.0).left() <= 1500.0
    assert Deadline(500.0).left() <= 500.0
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) - 5))
    assert Deadline(None).left() is None and 5900.0 < Deadline(6000.0).left() <= 6000.0
    for said in ("", "Unknown", "-1"):
        monkeypatch.setenv("SLURM_JOB_END_TIME", said)
        assert Deadline(None).left() is None

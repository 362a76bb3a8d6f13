"""`from train import train` in a process that goes on living: nothing of a run is left behind, whatever its end."""

import resource
import subprocess
import sys

import pytest

from tests.runs import PATIENCE, ROOT, environment
from train.run_directory import read_events

SESSION = """
import json
import logging
import os
import signal
import sys
import threading

from conf import compose
from train import train
from train.callbacks.base import Callback
from train.config import RunConfig
from train.run_directory import RunLock
from train.stop_requests import SIGNALS


def surroundings():
    import torch

    names = SIGNALS
    return {
        "signals": [str(signal.getsignal(name)) for name in names],
        "handlers": [str(handler) for handler in logging.getLogger().handlers],
        "variables": {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")},
        "group": torch.distributed.is_initialized(),
        "threads": torch.get_num_threads(),
        "files": sorted(f for f in (os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                                    if os.path.exists(f"/proc/self/fd/{n}")) if "/runs/" in f),
    }


class Seen(Callback):
    def __init__(self):
        self.steps = 0

    def on_step_end(self, trainer):
        self.steps += 1
        return super().on_step_end(trainer)


root, overrides = sys.argv[1], sys.argv[2:]
before, codes, seen = surroundings(), [], Seen()


def run(name, *more):
    config = compose(RunConfig, "train", [*overrides, f"run_root={root}/runs", f"name={name}", *more])
    codes.append(train(config, [seen]))
    assert surroundings() == before, (name, before, surroundings())
    # Nobody holds the run's folder.
    RunLock(__import__("pathlib").Path(root) / "runs" / name / "run.lock").release()


run("first", "training.total_steps=3")
run("second", "training.total_steps=3", "parallel=zero3")
run("first", "training.total_steps=5", "precision=bf16")
run("diverges", "training.total_steps=9", "optimizer.learning_rate=1e30", "schedule.warmup=0",
    "training.max_skipped_steps=1")
# What the last run failed of is gone: the same folder is free.
run("diverges", "training.total_steps=1")
run("first", "training.total_steps=5")
print(json.dumps({"codes": codes, "steps": seen.steps}))
"""


@pytest.mark.slow
def test_several_runs_in_one_process_leave_nothing_behind(tiny_run, tmp_path):
    (tmp_path / "session.py").write_text(SESSION)
    overrides = [item for item in tiny_run if not item.startswith(("name=", "run_root="))]
    command = [sys.executable, str(tmp_path / "session.py"), str(tmp_path), *overrides]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    # The interpreter ends in its own way, too.
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert '"codes": [0, 0, 0, 1, 0, 0]' in last, done.stdout + done.stderr
    assert "training.max_skipped_steps" in done.stderr and "The run 'first' is complete" in done.stderr
    assert [event["event"] for event in read_events(tmp_path / "runs" / "first") if event["event"] == "resume"]
    assert [event["event"] for event in read_events(tmp_path / "runs" / "diverges")].count("error") == 1


HELP_SECONDS = 1.0
HELP = """
import runpy
import sys

main = runpy.run_module(sys.argv[1], run_name="not_main")["main"]
try:
    main(["--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules
"""


def seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("command", ["train.__main__", "launch.__main__"])
def test_the_help_needs_no_torch(command):
    before = seconds_of_children()
    arguments = [sys.executable, "-c", HELP, command]
    done = subprocess.run(arguments, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python -m" in done.stdout
    # Computing time: that of the clock depends on what else the machine does.
    assert seconds_of_children() - before < HELP_SECONDS


def test_the_package_has_no_other_name():
    import train

    with pytest.raises(AttributeError, match="module 'train' has no attribute 'trian'"):
        train.trian  # noqa: B018

"""A training run on this machine: one process for each GPU, or a few on the CPU."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import psutil
import torch

from train.command import Command, compose_run, show_plan
from train.requirements import open_requirements

CPU_PROCESSES = 2
# Signals that ask this command to stop, and what the training processes get: those that they answer with a checkpoint.
_PASSED_ON = {number: number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
_PASSED_ON[signal.SIGHUP] = signal.SIGTERM


def default_processes() -> int:
    """One for each GPU; two on a machine without, so that sharding really happens."""
    return torch.cuda.device_count() or CPU_PROCESSES


def train_locally(given: Command, processes: int) -> int:
    """Run `python -m train` as `given` in `processes` processes; returns the exit code.

    Raises ConfigError for a configuration that cannot work, a missing or incomplete corpus included, before any process
    starts: torchrun's own exit code is 1 whatever the processes say.
    """
    # The ranks compare the shards' checksums.
    config = compose_run(given, processes)
    if given.plan:
        show_plan(config, processes)
        return 0
    open_requirements(config, processes, corpus_check="size")
    command = [sys.executable, "-m", "train", *given.arguments]
    if processes > 1:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, "-m", *launcher, "-m", "train", *given.arguments]
    return _run(command, processes)


def _run(command: Sequence[str], processes: int) -> int:
    """Run `command` to its end and return its exit code; signals that ask for a stop go on to the training processes.

    torchrun is passed by, and kept from what the terminal sends: it would end them after 30 seconds, checkpoint or not,
    and die of SIGUSR1 without ending them.
    """
    process = subprocess.Popen(command, env=_environment(processes), process_group=0)

    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            workers = psutil.Process(process.pid).children() if processes > 1 else []
            receivers: Sequence[psutil.Process | subprocess.Popen[bytes]] = workers or [process]
            for one in receivers:
                one.send_signal(_PASSED_ON[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in _PASSED_ON}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, pass_on)
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment(processes: int) -> dict[str, str]:
    """This process's variables, and what speeds up training on a CPU where the user has not chosen otherwise."""
    defaults = {}
    if processes > 1:
        # torchrun sets this too, with a warning.
        defaults["OMP_NUM_THREADS"] = "1"
    if not torch.cuda.is_available():
        # glibc hands large blocks back after each step; the page faults of the next one cost a sixth of the time.
        defaults |= {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    return {**defaults, **os.environ}

"""A training run on this machine: one process for each GPU, or a few on the CPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from launch.processes import TrainingProcesses
from train.command import Command, compose_run, show_plan
from train.requirements import open_requirements

CPU_PROCESSES = 2


def default_processes() -> int:
    """One for each GPU; two on a machine without, so that sharding really happens."""
    return torch.cuda.device_count() or CPU_PROCESSES


def train_locally(given: Command, processes: int, log: Path | None = None) -> int:
    """Run `python -m train` as `given` in `processes` processes; returns the exit code.

    `log`: the file that gets what they print; None: they print where this process does.

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
    return TrainingProcesses(processes).run(command, _environment(processes), log)


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

"""A training run on this machine: one process for each GPU, or a few on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from conf import ConfigError, compose
from train.config import RunConfig
from train.validate import validate

CPU_PROCESSES = 2


def default_processes() -> int:
    """One for each GPU; two on a machine without, so that sharding really happens."""
    return torch.cuda.device_count() or CPU_PROCESSES


def train_locally(overrides: Sequence[str], processes: int) -> int:
    """Run `python -m train` with Hydra `overrides` in `processes` processes; returns the exit code.

    Raises ConfigError, before any process starts, for a configuration that cannot work.
    """
    problems = validate(compose(RunConfig, "train", overrides), processes)
    if problems:
        raise ConfigError(problems)
    command = [sys.executable, "-m", "train", *overrides]
    if processes > 1:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, "-m", *launcher, "-m", "train", *overrides]
    # torchrun sets one thread a process where nothing else is said; training.cpu_threads says it in the configuration.
    environment = {"OMP_NUM_THREADS": "1", **os.environ} if processes > 1 else dict(os.environ)
    return subprocess.run(command, env=environment, check=False).returncode

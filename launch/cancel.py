"""`python -m launch cancel`: a run saves and ends, and its jobs leave the queue."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from conf import ConfigError
from launch import slurm
from launch.folder import LaunchFolder
from train.run_directory import write_atomically


def cancel(run: Path, now: bool) -> int:
    """Let the processes of `run` save and end, or end them at once. Raises ConfigError where it was not submitted."""
    folder = LaunchFolder(run.resolve())
    if not folder.job.is_file():
        raise ConfigError([f"{run}: was not submitted, it has no {folder.job.relative_to(folder.run)}"])
    jobs = slurm.live(folder.job_numbers())
    if not jobs:
        print(f"{run}: no job of it waits or runs", file=sys.stderr)
        return 0
    # Before any signal: the batch script asks for it once the processes have ended.
    write_atomically(folder.cancelled, time.strftime("%Y-%m-%dT%H:%M:%SZ\n", time.gmtime()))
    running = [] if now else [job for job in jobs if job.state == "RUNNING"]
    for job in jobs:
        if job not in running:
            slurm.cancel(job.number)
            print(f"job {job.number} is cancelled", file=sys.stderr)
    for job in running:
        slurm.signal_steps(job.number, "USR1")
        print(f"job {job.number} saves after its step and ends; --now would end it at once", file=sys.stderr)
    return 0

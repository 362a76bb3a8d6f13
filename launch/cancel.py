"""`python -m launch cancel`: a run saves and ends, and its jobs leave the queue."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from conf import ConfigError
from launch import slurm
from launch.folder import LaunchFolder
from launch.sweep.manifest import SweepFolder, is_sweep, read_manifest
from train.run_directory import write_atomically


def cancel(run: Path, now: bool) -> int:
    """Let the processes of `run` save and end, or end them at once; of a sweep those of all runs.

    Raises ConfigError where it was not submitted.
    """
    numbers = {folder: folder.job_numbers() for folder in _folders(run)}
    queue = [job for job in slurm.queue() if job.is_live]
    live = [(folder, job) for folder, own in numbers.items() for job in queue if job.is_of(own)]
    if not live:
        print(f"{run}: no job of it waits or runs", file=sys.stderr)
        return 0
    # Before any signal: the batch script asks for it once the processes have ended.
    for folder in dict.fromkeys(folder for folder, _ in live):
        write_atomically(folder.cancelled, time.strftime("%Y-%m-%dT%H:%M:%SZ\n", time.gmtime()))
    # Those that wait first: none of them is to take the place of one that ends.
    for _, job in sorted(live, key=lambda one: one[1].state == "RUNNING"):
        if job.state == "RUNNING" and not now:
            slurm.signal_steps(job.number, "USR1")
            print(f"job {job.number} saves after its step and ends; --now would end it at once", file=sys.stderr)
        else:
            slurm.cancel(job.number)
            print(f"job {job.number} is cancelled", file=sys.stderr)
    return 0


def _folders(run: Path) -> list[LaunchFolder]:
    if is_sweep(run):
        sweep = SweepFolder(run)
        return [LaunchFolder(sweep.run(row).resolve()) for row in read_manifest(sweep).rows]
    folder = LaunchFolder(run.resolve())
    if not folder.job.is_file():
        raise ConfigError([f"{run}: was not submitted, it has no {folder.job.relative_to(folder.run)}"])
    return [folder]

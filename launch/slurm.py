"""What is asked of Slurm and told to it, by its own commands."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from conf import ConfigError
from conf.problems import suggestion
from launch.job import Job, seconds_of

# Seconds that a controller may take to answer.
PATIENCE = 60
# States of a job that waits or runs, or may do so again.
LIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "STOPPED")


class SlurmError(OSError):
    """Slurm does not answer, or refuses what it should not."""


@dataclass(frozen=True)
class Partition:
    """A partition, as far as a job must fit into it."""

    name: str
    is_default: bool
    is_up: bool
    nodes: int
    # Of the node that has most.
    gpus_per_node: int
    # None: no limit.
    seconds: int | None


@dataclass(frozen=True)
class QueuedJob:
    """A job that Slurm remembers, or a task of an array."""

    # Of a task that of the array and its own: 12_3.
    number: str
    # As Slurm calls it: PENDING, RUNNING, COMPLETED, ...
    state: str
    # Why it waits or has ended; "None" while it runs.
    reason: str
    nodes: str
    name: str = ""

    @property
    def is_live(self) -> bool:
        """Whether it waits or runs, or may do so again."""
        return self.state in LIVE

    def is_of(self, numbers: Sequence[str]) -> bool:
        """Whether it is one of these jobs, or a task of one of these arrays."""
        return self.number in numbers or self.number.partition("_")[0] in numbers


def ask(*command: str, text: str | None = None) -> str:
    """What one of Slurm's commands prints. `text`: its standard input. Raises SlurmError, ConfigError without Slurm."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, input=text, check=False)
    except FileNotFoundError:
        raise ConfigError(
            [f"launch: {command[0]} is not on this machine; log in where jobs are submitted, or look with --dry-run"]
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{command[0]}: no answer within {PATIENCE} s; is the controller up? (scontrol ping)"
        ) from None
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())
        raise SlurmError(f"{command[0]}: {words or f'exit code {done.returncode}'}")
    # With --test-only sbatch answers on standard error.
    return done.stdout or done.stderr


def partitions() -> list[Partition]:
    """Every partition of the cluster."""
    found: dict[str, Partition] = {}
    for line in ask("sinfo", "-h", "-o", "%P|%a|%D|%G|%l").splitlines():
        name, is_up, nodes, resources, limit = line.split("|")
        plain = name.removesuffix("*")
        before = found.get(plain)
        found[plain] = Partition(
            name=plain,
            is_default=name.endswith("*"),
            is_up=is_up == "up",
            nodes=int(nodes) + (before.nodes if before else 0),
            gpus_per_node=max(gpus_of(resources), before.gpus_per_node if before else 0),
            seconds=seconds_of(limit),
        )
    return list(found.values())


def gpus_of(resources: str) -> int:
    """The GPUs of a node in a list such as `gpu:h100:8(S:0-1),nvme:1`."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", resources))


def keeps_accounts() -> bool:
    """Whether the cluster knows accounts and qualities of service."""
    found = re.search(r"AccountingStorageType\s*=\s*(\S+)", ask("scontrol", "show", "config"))
    return found is not None and not found[1].endswith("/none")


def misfits(job: Job) -> list[str]:
    """Why the cluster has no place for the job, one line each."""
    launch, machines = job.machines.launch, job.machines
    known = {partition.name: partition for partition in partitions()}
    problems = []
    for key in ("account", "qos"):
        if (value := getattr(launch, key)) is not None and not keeps_accounts():
            problems.append(f"launch.{key}: this cluster keeps no accounts ({value}); set launch.{key}=null")
    chosen = [known.get(name) for name in (launch.partition or "").split(",") if name]
    if launch.partition is None:
        chosen = [partition for partition in known.values() if partition.is_default]
        if not chosen:
            problems.append(
                f"launch.partition: null, and no partition is the default; choose one of {', '.join(known)}"
            )
    for name in (launch.partition or "").split(","):
        if name and name not in known:
            near = suggestion(name, list(known))
            problems.append(f"launch.partition: no partition '{name}'{near}; choose one of {', '.join(known)}")
    there = [partition for partition in chosen if partition is not None]
    if not there or len(there) < len(chosen):
        return problems
    where = " and ".join(partition.name for partition in there)
    if not any(partition.is_up for partition in there):
        problems.append(f"launch.partition: {where} takes no jobs now; choose one of {', '.join(known)}")
    if machines.nodes > (nodes := max(partition.nodes for partition in there)):
        problems.append(f"nodes: {machines.nodes} are more than the {nodes} of partition {where}; use at most {nodes}")
    if machines.gpus_per_node > (gpus := max(partition.gpus_per_node for partition in there)):
        advice = f"use at most {gpus}" if gpus else "choose another partition, or gpus_per_node=0 to compute on CPUs"
        problems.append(
            f"gpus_per_node: {machines.gpus_per_node} are more than the {gpus} that a node of partition {where} has; "
            f"{advice}"
        )
    limits = [partition.seconds for partition in there]
    limit = None if None in limits else max(seconds for seconds in limits if seconds is not None)
    if limit is not None and (seconds_of(launch.time) or 0) > limit:
        hours, rest = divmod(limit, 3600)
        longest = f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
        problems.append(f"launch.time: {launch.time} is longer than partition {where} allows; use at most {longest}")
    return problems


def test(script: str) -> str:
    """What the scheduler says of a job with this script: when it would start. Raises ConfigError where it refuses."""
    try:
        return " ".join(ask("sbatch", "--test-only", text=script).split())
    except SlurmError as error:
        raise ConfigError(
            [f"launch: Slurm refuses the job ({error}); change what it names, or launch.options"]
        ) from None


def submit(script: str, *options: str) -> str:
    """Queue a job with the script in this file; returns Slurm's number of it."""
    return ask("sbatch", "--parsable", *options, script).strip().partition(";")[0]


def queue() -> list[QueuedJob]:
    """This user's jobs that Slurm remembers, those that have ended a while ago included."""
    # A line for each task of an array; what a name may be comes last.
    lines = ask("squeue", "--me", "-r", "-h", "-t", "all", "-o", "%i|%T|%r|%N|%j").splitlines()
    return [QueuedJob(*line.split("|", 4)) for line in lines if line.count("|") >= 4]


def live(numbers: Sequence[str]) -> list[QueuedJob]:
    """Those of the jobs with these numbers that wait or run."""
    if not numbers:
        return []
    return [job for job in queue() if job.is_of(numbers) and job.is_live]


def signal_steps(number: str, signal: str) -> None:
    """Send a signal to the processes of a job's steps, and not to its batch script."""
    ask("scancel", f"--signal={signal}", number)


def cancel(*numbers: str) -> None:
    """End jobs, whether they wait or run."""
    ask("scancel", *numbers)

"""The variables that Slurm sets for a job, a step or a task of an array: read here alone. Imports no package."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

# Ports that a run's processes meet at: below those that a system gives to clients.
_FIRST_PORT, _PORTS = 12_000, 20_000


@dataclass(frozen=True)
class ArrayTask:
    """One task of a Slurm array."""

    # Its id, the first and the last id of the array, and the step from one id to the next.
    number: int
    first: int
    last: int
    step: int
    count: int

    @property
    def index(self) -> int | None:
        """Its place in the array, from 0; None where the ids are not in equal steps."""
        is_even = (self.last - self.first) // self.step + 1 == self.count and not (self.number - self.first) % self.step
        return (self.number - self.first) // self.step if is_even else None


def array_task(variables: Mapping[str, str] = os.environ) -> ArrayTask | None:
    """The task of an array that this process belongs to; None outside of arrays."""
    if "SLURM_ARRAY_TASK_ID" not in variables:
        return None
    number, first, last, count = (int(variables[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "COUNT"))
    return ArrayTask(number, first, last, int(variables.get("SLURM_ARRAY_TASK_STEP", "1")), count)


@dataclass(frozen=True)
class StepTask:
    """One of several processes that `srun` started together."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    # The host of rank 0, and a port that neither another step of the job nor its attempt before used.
    address: str
    port: int


def step_task(variables: Mapping[str, str] = os.environ) -> StepTask | None:
    """What `srun` says of this process; None where it started this one alone, in a batch script, or without Slurm."""
    # A batch script has most of these variables too, but is no step.
    if "SLURM_STEP_ID" not in variables or int(variables.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return None
    node = int(variables["SLURM_NODEID"])
    job, restarts, step = (int(variables.get(f"SLURM_{name}", "0")) for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    return StepTask(
        rank=int(variables["SLURM_PROCID"]),
        size=int(variables["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(variables["SLURM_LOCALID"]),
        local_size=_repeated(variables["SLURM_STEP_TASKS_PER_NODE"])[node],
        address=hosts(variables["SLURM_STEP_NODELIST"])[0],
        port=_FIRST_PORT + (97 * job + 13 * restarts + step) % _PORTS,
    )


def become_rank(variables: MutableMapping[str, str] = os.environ) -> None:
    """Set what torchrun would set, for a process that plain `srun` started as one of several.

    What is there already stays: under torchrun everything, else an address or a port that a user has chosen.
    """
    task = None if "RANK" in variables else step_task(variables)
    if task is None:
        return
    values = {
        "RANK": task.rank,
        "WORLD_SIZE": task.size,
        "LOCAL_RANK": task.local_rank,
        "LOCAL_WORLD_SIZE": task.local_size,
        "MASTER_ADDR": task.address,
        "MASTER_PORT": task.port,
    }
    for name, value in values.items():
        variables.setdefault(name, str(value))


def node_name(variables: Mapping[str, str] = os.environ) -> str | None:
    """The name that Slurm has for this machine; None outside of jobs."""
    return variables.get("SLURMD_NODENAME")


def job_nodes(variables: Mapping[str, str] = os.environ) -> list[str]:
    """The nodes of this job, in Slurm's order; [] outside of jobs."""
    return hosts(variables.get("SLURM_JOB_NODELIST", ""))


def job_identity(variables: Mapping[str, str] = os.environ) -> str | None:
    """What Slurm's commands take for this job; None outside of jobs.

    Of a task of an array it names the task: the bare number of the last task is that of the whole array.
    """
    if "SLURM_ARRAY_JOB_ID" in variables:
        return f"{variables['SLURM_ARRAY_JOB_ID']}_{variables['SLURM_ARRAY_TASK_ID']}"
    return variables.get("SLURM_JOB_ID")


def job_end(variables: Mapping[str, str] = os.environ) -> float | None:
    """When the time of this job is over, in seconds since 1970; None outside of jobs, and where that is not said.

    Slurm 22.05 does not set the variable, later ones do; the batch script of `launch submit` does where it is missing.
    """
    text = variables.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdecimal() else None


def hosts(text: str) -> list[str]:
    """The hosts of a list as Slurm writes it: `n[01-03,7],login` are n01, n02, n03, n7 and login."""
    found = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        names = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            ends = [plain] if plain else [number for item in ranges.split(",") for number in _numbers(item)]
            names = [name + end for name in names for end in ends]
        found += names
    return found


def _numbers(text: str) -> list[str]:
    first, _, last = text.partition("-")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]


def _repeated(text: str) -> list[int]:
    """The numbers of a list such as `2(x3),1`."""
    found = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [int(number)] * int(times or 1)
    return found

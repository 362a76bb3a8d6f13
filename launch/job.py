"""A run and the machines that it asks for: `python -m launch submit nodes=2 gpus_per_node=8 name=... key=value`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf import ConfigError, compose
from conf.problems import at_least, choice
from train.command import Command, compose_run
from train.config import RunConfig
from train.estimate.calibration import shipped

CONTINUATIONS = ("requeue", "chain")
CONTAINERS = ("pyxis", "apptainer")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


@dataclass(frozen=True)
class ContainerConfig:
    """A container that the processes of the run are in. The batch script stays outside: it needs Slurm's commands."""

    # pyxis (a plugin of Slurm) or apptainer; null: no container.
    kind: str | None
    # As the kind takes it: a file, or a name such as `nvcr.io#nvidia/pytorch:25.10-py3`.
    image: str | None
    # What is seen inside beside the run and the code, each as `HOST:CONTAINER`.
    mounts: list[str]
    # The Python in the container that has this project's dependencies.
    python: str


@dataclass(frozen=True)
class PreflightConfig:
    """What every node must pass before the processes of the run meet there. A node that does not is left out."""

    # That the checks may take, the meeting of all processes included; 0: nothing is checked.
    seconds: int
    # That must be free on the disks of the run and of temporary files.
    free_gib: float
    # Of a GPU that may be in use before the run begins; more is left by another program.
    used_gpu_mib: int
    # Temperature above which an idle GPU is not healthy.
    gpu_celsius: int
    # Size of the tensor that all processes add up once they have met; 0: none.
    all_reduce_mib: int
    # Bandwidth that this must reach.
    all_reduce_gib_per_second: float


@dataclass(frozen=True)
class LaunchConfig:
    """How the job is started, and what it needs from the cluster."""

    # That one attempt may take, as Slurm writes it: `days-hours:minutes:seconds`.
    time: str
    # What kind of GPU the nodes have, for the plan that is shown: a calibration of this name comes with the package
    # (train/estimate/calibrations); null: not known, so the plan has no time.
    gpu: str | None
    # Before the end of the time, when the run is told to save. More than a step and two checkpoints take.
    signal_seconds: int
    # How a run goes on that has been stopped or has failed. requeue: Slurm queues its job again. chain: for clusters
    # that do not allow it, several jobs are queued at once, one behind the other.
    continuation: str
    # Jobs of a chain.
    chain: int
    # After so many attempts that have brought no new checkpoint the run is given up.
    attempts_without_progress: int
    # A node on which the first rank failed in so many attempts is left out; 0: none is.
    exclude_after: int
    # Where the job waits and who pays for it; null: the cluster's default.
    partition: str | None
    # As `partition`.
    account: str | None
    # Quality of service; null: the default of the account.
    qos: str | None
    # Features that nodes must have.
    constraint: str | None
    # A reservation to be used.
    reservation: str | None
    # What the job waits for, as `sbatch --dependency` takes it.
    dependency: str | None
    # Address that mail goes to.
    mail: str | None
    # What mail is sent of.
    mail_events: list[str]
    # Whole nodes, with all of their memory.
    exclusive: bool
    # Cores of each process; null: the cluster's default.
    cpus_per_task: int | None
    # Of a node, such as `100G`; null: all with `exclusive`, else the cluster's default.
    memory: str | None
    # Further options of sbatch, such as `--switches=1`.
    options: list[str]
    # Lines of the batch script before anything is started, such as `module load cuda`.
    setup: list[str]
    # Environment variables of the run's processes.
    environment: dict[str, str]
    container: ContainerConfig
    preflight: PreflightConfig


@dataclass(frozen=True)
class SubmitConfig:
    """Where a run is computed, beside the configuration of the run itself: both are given in one command."""

    # Machines.
    nodes: int
    # Of each node; 0: the run computes on CPUs.
    gpus_per_node: int
    # null: one for each GPU.
    processes_per_node: int | None
    launch: LaunchConfig


@dataclass(frozen=True)
class Job:
    """One run as it is to be submitted."""

    # Of the run, without those of the machines.
    overrides: list[str]
    # What they are put on top of; None: conf/train.yaml.
    base: Path | None
    machines: SubmitConfig

    @property
    def processes_per_node(self) -> int:
        """One for each GPU unless told otherwise."""
        return self.machines.processes_per_node or self.machines.gpus_per_node

    @property
    def processes(self) -> int:
        """Of the whole run."""
        return self.machines.nodes * self.processes_per_node


def read_job(arguments: Sequence[str], base: Path | None = None) -> tuple[Job, RunConfig]:
    """Sort the settings of a command into those of machines and of the run.

    Raises ConfigError with all problems, but what `open_requirements` finds of a run whose values can be read.
    """
    of_machines = [argument for argument in arguments if is_of_machines(argument)]
    overrides = [argument for argument in arguments if not is_of_machines(argument)]
    problems: list[str] = []
    try:
        machines = compose(SubmitConfig, "submit", of_machines, validate_machines)
        problems += validate_machines(machines)
    except ConfigError as error:
        problems += error.problems
    if problems:
        # Of how many processes a run would be is not known: what else is wrong with it does not depend on that.
        _compose_alone(overrides, base, problems)
        raise ConfigError(problems)
    job = Job(overrides, base, machines)
    return job, compose_run(Command(overrides, config=base), job.processes)


def _compose_alone(overrides: list[str], base: Path | None, problems: list[str]) -> None:
    try:
        compose_run(Command(overrides, config=base), 1)
    except ConfigError as error:
        problems += error.problems


def is_of_machines(argument: str) -> bool:
    """Whether a setting is of the machines of a job, not of its run."""
    key = argument.lstrip("+~").partition("=")[0].replace("-", "_")
    return key in ("nodes", "gpus_per_node", "processes_per_node", "launch") or key.startswith("launch.")


def seconds_of(time: str) -> int | None:
    """The seconds of a time as Slurm writes it; None for another text, such as UNLIMITED."""
    found = _TIME.fullmatch(time.strip())
    if found is None:
        return None
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return int(found["days"]) * 86_400 + hours * 3600 + minutes * 60 + seconds
    # One number is minutes, two are minutes and seconds.
    hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return hours * 3600 + minutes * 60 + seconds


def validate_machines(config: SubmitConfig) -> list[str]:
    """All problems of what is asked for, one line each, as far as they can be told without Slurm."""
    launch = config.launch
    preflight = launch.preflight
    problems = [
        *at_least("nodes", config.nodes, 1),
        *at_least("gpus_per_node", config.gpus_per_node, 0),
        *at_least("processes_per_node", config.processes_per_node, 1),
        *choice("launch.continuation", launch.continuation, CONTINUATIONS),
        *([] if launch.gpu is None else choice("launch.gpu", launch.gpu, shipped(), "calibration")),
        *at_least("launch.chain", launch.chain, 1),
        *at_least("launch.attempts_without_progress", launch.attempts_without_progress, 1),
        *at_least("launch.exclude_after", launch.exclude_after, 0),
        *at_least("launch.cpus_per_task", launch.cpus_per_task, 1),
        *at_least("launch.signal_seconds", launch.signal_seconds, 1),
        *at_least("launch.preflight.seconds", preflight.seconds, 0),
        *at_least("launch.preflight.all_reduce_mib", preflight.all_reduce_mib, 0),
    ]
    if not problems and config.gpus_per_node == 0 and config.processes_per_node is None:
        problems.append(
            "processes_per_node: null means one for each GPU, and gpus_per_node is 0; set processes_per_node=N"
        )
    if not problems and config.gpus_per_node and (config.processes_per_node or 1) > config.gpus_per_node:
        problems.append(
            f"processes_per_node: {config.processes_per_node} processes do not find a GPU each on a node of "
            f"gpus_per_node={config.gpus_per_node}; use at most {config.gpus_per_node}"
        )
    return problems + _validate_time(launch) + _validate_texts(launch) + _validate_container(launch.container)


def _validate_time(launch: LaunchConfig) -> list[str]:
    seconds = seconds_of(launch.time)
    if seconds is None:
        return [f"launch.time: no time as Slurm writes it ({launch.time}); use hours:minutes:seconds, such as 24:00:00"]
    if seconds <= launch.signal_seconds:
        return [
            f"launch.signal_seconds: {launch.signal_seconds} s before the end of {launch.time} (launch.time) is before "
            "the beginning; use a longer time or less"
        ]
    return []


def _validate_texts(launch: LaunchConfig) -> list[str]:
    """What would be more than one option, or variable, of a batch script."""
    names = ("partition", "account", "qos", "constraint", "reservation", "dependency", "mail", "memory")
    problems = [
        f"launch.{name}: a word without spaces is wanted ({value!r})"
        for name in names
        if (value := getattr(launch, name)) is not None and re.search(r"\s|^$", value)
    ]
    problems += [
        f"launch.options: an option of sbatch in one line is wanted, such as --switches=1 ({option!r})"
        for option in launch.options
        if not re.fullmatch(r"--?[^\n]+", option)
    ]
    return problems + [
        f"launch.environment: no name of a variable ({name!r}); use letters, digits and _"
        for name in launch.environment
        if not re.fullmatch(r"[A-Za-z_]\w*", name, flags=re.ASCII)
    ]


def _validate_container(container: ContainerConfig) -> list[str]:
    if container.kind is None:
        return []
    problems = choice("launch.container.kind", container.kind, CONTAINERS)
    if container.image is None:
        problems.append(f"launch.container.image: null, and {container.kind} needs one; name a file or an image")
    return problems + [
        f"launch.container.mounts: HOST:CONTAINER is wanted ({mount})"
        for mount in container.mounts
        if ":" not in mount or "," in mount
    ]

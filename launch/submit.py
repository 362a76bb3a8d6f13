"""`python -m launch submit`: check a run and its machines, keep code and configuration, queue the job."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf import ConfigError
from conf.passwords import without_passwords
from launch import slurm
from launch.folder import LaunchFolder
from launch.job import Job, read_job
from launch.script import TEMPLATES, Place, render
from model.hardware import CPU
from train.config import RunConfig
from train.data import describe_data
from train.estimate.calibration import SHIPPED, read_calibration
from train.estimate.machine import Machine
from train.interpreter import python_name
from train.plan import ANY_GPU
from train.requirements import open_requirements
from train.run_directory import COPIED_REVISION, RunDirectory, code_revision, write_atomically
from train.stored_configuration import as_json, as_yaml, configuration_before, differences, written

FORMAT_VERSION = 1
PACKAGES = ("conf", "data_pipeline", "kernels", "launch", "model", "slurm", "train")


@dataclass(frozen=True)
class Submission:
    """What `python -m launch submit` is given."""

    arguments: Sequence[str]
    # A run's configuration that the arguments are put on top of.
    base: Path | None = None
    # Print the script, without Slurm; or ask the scheduler. Neither starts anything.
    dry_run: bool = False
    test_only: bool = False


def submit(given: Submission) -> int:
    """Queue a run; returns the exit code. Raises ConfigError with whatever is wrong, before anything is written."""
    job, config = read_job(given.arguments, given.base)
    if dataclasses.asdict(config) != without_passwords(dataclasses.asdict(config)):
        raise ConfigError(
            ["launch: the configuration holds a password, and what a job reads is a file; name the place without it"]
        )
    found = open_requirements(config, job.processes, elsewhere=computed_by(job, config))
    place = Place(LaunchFolder(found.directory.path.resolve()), Path.cwd())
    script = render(job, config.name, place)
    _say(f"{found.plan.describe()}\n{describe_data(config, found.plan, found.stream)}")
    for line in changes(config, found.directory):
        _say(line)
    if given.dry_run:
        print(script, end="")
        _say(f"the run    would lie in {found.directory.path}; nothing was written or submitted")
        return 0
    if problems := slurm.misfits(job):
        raise ConfigError(problems)
    answer = slurm.test(script)
    if given.test_only:
        print(answer)
        return 0
    _refuse_second(place.folder)
    write(job, config, script, place.folder)
    numbers = _queue(job, place.folder)
    _say(_next_commands(numbers, found.directory.path))
    print(numbers[0])
    return 0


def computed_by(job: Job, config: RunConfig) -> Machine | str:
    """What the plan of a job is made for: the machine that submits it may be none of the cluster's nodes."""
    machines = job.machines
    if machines.gpus_per_node == 0:
        return CPU
    if machines.launch.gpu is None:
        return ANY_GPU
    calibration = read_calibration(SHIPPED / f"{machines.launch.gpu}.json")
    # Its products were measured in bf16.
    if not config.precision.is_bf16:
        return calibration.device
    return Machine(calibration, machines.nodes, job.processes)


def _say(text: str) -> None:
    print(without_passwords(text), file=sys.stderr, flush=True)


def changes(config: RunConfig, directory: RunDirectory) -> list[str]:
    """What an earlier start of the run was configured otherwise, one line for each key."""
    before, _ = configuration_before(directory)
    if before is None:
        return []
    return [
        f"changed    {key}: {written(old)} -> {written(new)}"
        for key, (old, new) in differences(before, as_json(config)).items()
    ]


def _refuse_second(folder: LaunchFolder) -> None:
    if jobs := slurm.live(folder.job_numbers()):
        which = ", ".join(f"{job.number} ({job.state})" for job in jobs)
        raise ConfigError(
            [
                f"name: {folder.run} is in the queue already, as job {which}; end it first ({python_name()} -m launch "
                f"cancel {folder.run}), or give this run another name"
            ]
        )


def write(job: Job, config: RunConfig, script: str, folder: LaunchFolder) -> None:
    """Put everything that the job needs into the run's folder."""
    RunDirectory(folder.run).create()
    folder.path.mkdir(exist_ok=True)
    copy_code(folder.code)
    shutil.copy(TEMPLATES / "preflight.sh", folder.preflight)
    write_atomically(folder.config, as_yaml(config))
    write_atomically(folder.script, script, mode=0o777)
    launch = job.machines.launch
    content = {
        "format_version": FORMAT_VERSION,
        "overrides": without_passwords(job.overrides),
        "base": None if job.base is None else str(job.base),
        "machines": dataclasses.asdict(job.machines),
        "processes_per_node": job.processes_per_node,
        "attempts_without_progress": launch.attempts_without_progress,
        "exclude_after": launch.exclude_after,
    }
    write_atomically(folder.job, json.dumps(content, indent=1))
    folder.cancelled.unlink(missing_ok=True)


def copy_code(target: Path) -> None:
    """Copy the packages, and what git says of them: a job in the queue goes on with the code of its submission."""
    source = Path(__file__).resolve().parents[1]
    revision = code_revision(source)
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for package in PACKAGES:
        shutil.copytree(source / package, part / package, ignore=shutil.ignore_patterns("__pycache__"))
    # What is not committed may be meant for nobody else.
    write_atomically(part / COPIED_REVISION, json.dumps(revision, indent=1), mode=0o600)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def _queue(job: Job, folder: LaunchFolder) -> list[str]:
    """Queue the job, or its chain; returns Slurm's numbers."""
    launch, numbers = job.machines.launch, list[str]()
    # Jobs of before are over; the first of this submission must not look for them.
    write_atomically(folder.jobs, "")
    folder.note("submit", overrides=without_passwords(job.overrides))
    for _ in range(launch.chain if launch.continuation == "chain" else 1):
        options = [f"--dependency=afterany:{numbers[-1]}"] if numbers else []
        numbers.append(slurm.submit(str(folder.script), *options))
        write_atomically(folder.jobs, "".join(f"{number}\n" for number in numbers))
    return numbers


def _next_commands(numbers: list[str], run: Path) -> str:
    python = python_name()
    jobs = (
        f"job {numbers[0]}" if len(numbers) == 1 else f"a chain of {len(numbers)} jobs, {numbers[0]} to {numbers[-1]}"
    )
    return (
        f"{jobs}: {run}. Next:\n  {python} -m launch status {run}\n  {python} -m launch logs {run} --follow\n"
        f"  {python} -m launch cancel {run}"
    )

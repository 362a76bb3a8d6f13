"""`python -m launch fork RUN step=N name=NAME key=value`: a new run that goes on from a step of another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf import ConfigError
from launch.job import is_of_machines
from launch.submit import Submission, submit
from train.command import Command, read_run_config


@dataclass(frozen=True)
class Fork:
    """What `python -m launch fork` is given."""

    run: Path
    # step=N, name=NAME, settings of the new run, and of machines where it is to be submitted.
    arguments: Sequence[str]
    # On this machine; None: one for each GPU.
    processes: int | None = None
    plan: bool = False
    dry_run: bool = False
    test_only: bool = False


def fork(given: Fork) -> int:
    """Start the branch, here or on the machines that are asked for; returns the exit code.

    Raises ConfigError for what the user must change.
    """
    arguments = branch_settings(given)
    on_cluster = any(is_of_machines(argument) for argument in arguments) or given.dry_run or given.test_only
    if on_cluster and (given.plan or given.processes):
        raise ConfigError(
            ["--plan, --processes: are for this machine, and nodes, gpus_per_node, launch.* for a cluster"]
        )
    if on_cluster:
        return submit(Submission(arguments, given.run, given.dry_run, given.test_only))
    # Importing it takes seconds, as all that trains here.
    from launch.local import default_processes, train_locally

    return train_locally(Command(arguments, given.plan, given.run), given.processes or default_processes())


def branch_settings(given: Fork) -> list[str]:
    """The settings of the branch, on top of the configuration of its parent. Raises ConfigError."""
    steps = [argument.partition("=")[2] for argument in given.arguments if argument.startswith("step=")]
    rest = [argument for argument in given.arguments if not argument.startswith("step=")]
    parent = read_run_config(given.run)
    problems = []
    if len(steps) > 1 or any(not step.isdecimal() for step in steps):
        problems.append(f"step: one whole number of completed steps is wanted ({', '.join(steps)})")
    if not any(argument.startswith("name=") for argument in rest):
        problems.append(f"name: a branch is a run of its own; give name=NAME (its parent is {parent.get('name')})")
    if f"name={parent.get('name')}" in rest and not any(argument.startswith("run_root=") for argument in rest):
        problems.append(f"name: {parent.get('name')} is its parent; give the branch another name")
    problems += [
        f"{argument}: a fork begins from RUN and step=N"
        for argument in rest
        if argument.startswith(("resume_from=", "initialise_from="))
    ]
    if problems:
        raise ConfigError(problems)
    place = given.run if not steps else f"{given.run}@{steps[0]}"
    # Beside its parent, wherever that lies now; what comes later wins.
    return [f'run_root="{given.run.parent}"', *rest, f'resume_from="{place}"', "initialise_from=null"]

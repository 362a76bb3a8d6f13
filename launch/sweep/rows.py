"""The run of a row, made ready to start: its configuration and what its attempts need, in its folder."""

from __future__ import annotations

import json

from conf.passwords import without_passwords
from launch.folder import LaunchFolder
from launch.job import LaunchConfig
from launch.submit import FORMAT_VERSION
from launch.sweep.manifest import Row, SweepFolder
from train.command import Command, compose_run
from train.config import RunConfig
from train.run_directory import RunDirectory, write_atomically
from train.stored_configuration import as_yaml
from train.validate import validate


def config_of(folder: SweepFolder, row: Row) -> RunConfig:
    """The configuration of a row's run. Raises ConfigError where it does not work any more."""
    return compose_run(Command([*row.overrides, *folder.origin(row)]), row.processes)


def problems_on(config: RunConfig, processes: int) -> list[str]:
    """Why the run does not go on so many processes, one line each. Pure."""
    return validate(config, processes)


def prepare(
    folder: SweepFolder, row: Row, config: RunConfig, launch: LaunchConfig, processes_per_node: int
) -> LaunchFolder:
    """Write what the attempts of a row need, and begin to count them anew."""
    run = LaunchFolder(folder.run(row))
    RunDirectory(run.run).create()
    run.path.mkdir(exist_ok=True)
    write_atomically(run.config, as_yaml(config))
    content = {
        "format_version": FORMAT_VERSION,
        "overrides": without_passwords(row.overrides),
        "base": None,
        "machines": None,
        "processes_per_node": processes_per_node,
        "attempts_without_progress": launch.attempts_without_progress,
        "exclude_after": launch.exclude_after,
    }
    write_atomically(run.job, json.dumps(content, indent=1))
    run.cancelled.unlink(missing_ok=True)
    # Jobs of before are over.
    write_atomically(run.jobs, "")
    run.note("submit", overrides=without_passwords(row.overrides))
    return run

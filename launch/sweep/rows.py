"""The run of a row, made ready to start: its configuration and what its attempts need, in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence

from conf import ConfigError
from conf.passwords import without_passwords
from launch.folder import LaunchFolder
from launch.job import LaunchConfig
from launch.submit import FORMAT_VERSION
from launch.sweep.manifest import Row, SweepFolder, by_text
from train.changes import changes_of_run
from train.command import Command, compose_run
from train.config import RunConfig
from train.run_directory import RunDirectory, write_atomically
from train.stored_configuration import as_yaml
from train.validate import validate


def configs_of(folder: SweepFolder, rows: Sequence[Row], processes: int | None = None) -> dict[str, RunConfig]:
    """Row -> its run, checked against its folder.

    `processes`: of each run; None: as it was planned.
    Raises ConfigError with all problems of all rows: settings that do not work any more, or not on so many processes,
    and folders that belong to another run.
    """
    configs, problems = {}, list[tuple[str, str]]()
    for row in rows:
        count = processes or row.processes
        try:
            config = compose_run(Command([*row.overrides, *folder.settings(row)]), count)
        except ConfigError as error:
            problems += [(row.name, problem) for problem in error.problems]
            continue
        found = validate(config, count) or changes_of_run(config, RunDirectory(folder.run(row)))
        problems += [(row.name, problem) for problem in found]
        configs[row.name] = config
    if problems:
        raise ConfigError(by_text(problems, len(rows)))
    return configs


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

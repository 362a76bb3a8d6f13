"""`python -m launch sweep plan`: a manifest of all runs, each of them checked as a run is, before anything starts."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from conf import ConfigError, compose, to_dataclass
from conf.passwords import without_passwords
from launch.job import SubmitConfig, is_of_machines
from launch.sweep.config import SweepPlanConfig, owned_settings, validate_sweep
from launch.sweep.grid import Grid, check_warmups, expand
from launch.sweep.manifest import (
    TRUNK,
    Manifest,
    Row,
    SweepFolder,
    by_text,
    compare,
    is_same_run,
    is_sweep,
    named,
    read_manifest,
    write_manifest,
)
from launch.sweep.prediction import Predict, predictor
from train.config import RunConfig
from train.plan import ANY_GPU
from train.requirements import open_requirements

_HEADS = ("run", "parameters", "tokens", "FLOPs", "steps", "batch", "rate", "processes", "hours")


def read_sweep(arguments: Sequence[str]) -> tuple[SweepPlanConfig, list[str]]:
    """The sweep that a command describes, and the settings in it that are of every run.

    Raises ConfigError with all problems that show without the runs.
    """
    config, further, problems = _composed(arguments)
    if problems:
        raise ConfigError(problems)
    return config, further


def _composed(arguments: Sequence[str]) -> tuple[SweepPlanConfig, list[str], list[str]]:
    """What `read_sweep` returns, and what is wrong with the values. Raises ConfigError where some are missing."""
    of_sweep = [argument for argument in arguments if _is_of_sweep(argument)]
    further = [argument for argument in arguments if not _is_of_sweep(argument)]
    config = compose(SweepPlanConfig, "sweep", of_sweep, lambda rest: [*validate_sweep(rest), *_owned(further, rest)])
    return config, further, [*validate_sweep(config), *_owned(further, config)]


def _owned(further: list[str], config: SweepPlanConfig) -> list[str]:
    return list(owned_settings("the command", further, config.sweep))


def _is_of_sweep(argument: str) -> bool:
    key = argument.lstrip("+~").partition("=")[0]
    return is_of_machines(argument) or key == "sweep" or key.startswith("sweep.")


def folder_of(config: SweepPlanConfig) -> SweepFolder:
    """Where the sweep lies."""
    return SweepFolder(Path(config.sweep.root) / config.sweep.name)


def plan_sweep(arguments: Sequence[str], is_dry: bool = False, replace: bool = False) -> int:
    """Write the manifest of the sweep that `arguments` describe, and print it; returns the exit code.

    Args:
        is_dry: write nothing.
        replace: take the place of a manifest that differs; its rows that have begun must be in the new one.

    Raises ConfigError with every problem of every row.
    """
    config, further, of_sweep = _composed(arguments)
    if any(not problem.startswith("launch.") for problem in of_sweep):
        # Rows follow from these values.
        raise ConfigError(of_sweep)
    folder, grid = folder_of(config), expand(config, further)
    problems = grid.problems + check_warmups(grid, config.sweep.longest_warmup)
    if not problems:
        problems = _problems_of_files(grid, folder)
    if problems or of_sweep:
        raise ConfigError([*of_sweep, *by_text(problems, len(grid.rows))])
    if not grid.rows:
        raise ConfigError(["sweep: its limits leave out every run; change sweep.least_tokens_per_parameter or most_"])
    predict = None if config.sweep.gpu is None else predictor(config.sweep.gpu)
    manifest = manifest_of(config, arguments, grid, predict)
    is_planned = _compare_with_planned(manifest, folder, replace)
    print(table(manifest.rows, grid))
    for key, names in _left_out(manifest).items():
        print(f"left out by sweep.{key}: {named(names)}")
    if is_dry:
        _say(f"{folder.path}: nothing was written")
    elif is_planned:
        _say(f"{folder.manifest}: is planned like this already")
    else:
        write_manifest(manifest, folder)
        _say(f"{folder.manifest}: {len(manifest.rows)} runs; start them with `sweep submit {folder.path}`")
    return 0


def _say(text: str) -> None:
    print(without_passwords(text), file=sys.stderr, flush=True)


def manifest_of(
    config: SweepPlanConfig, arguments: Sequence[str], grid: Grid, predict: Predict | None = None
) -> Manifest:
    """The manifest of a grid without problems. `predict`: None: nothing is predicted."""
    rows = grid.rows
    if predict is not None:
        rows = [dataclasses.replace(row, hours=_own_hours(row, predict(grid.configs[row.name], row))) for row in rows]
    values = without_passwords(dataclasses.asdict(config))
    if values != dataclasses.asdict(config) or without_passwords(list(arguments)) != list(arguments):
        raise ConfigError(["sweep: its settings hold a password, and a manifest is a file; name the place without it"])
    return Manifest(config.sweep.name, list(arguments), values, rows, grid.left_out)


def _left_out(manifest: Manifest) -> dict[str, list[str]]:
    """Key of the sweep -> the runs that it leaves out."""
    found: dict[str, list[str]] = {}
    for one in manifest.left_out:
        found.setdefault(one.key, []).append(one.name)
    return found


def _own_hours(row: Row, hours: float | None) -> float | None:
    """Of a branch those of its own steps."""
    return None if hours is None else hours * row.own_flops / row.flops


def _problems_of_files(grid: Grid, folder: SweepFolder) -> list[tuple[str, str]]:
    """What `python -m train` would refuse for the sake of files: corpora, held-out sets, folders of other runs."""
    problems = []
    for row in grid.rows:
        config = dataclasses.replace(grid.configs[row.name], run_root=str(folder.runs))
        if row.parent is not None and _has_begun(folder, row):
            # Before, where it begins is not there; else a branch is like any other run.
            config = dataclasses.replace(config, resume_from=folder.origin(row))
        try:
            open_requirements(config, row.processes, elsewhere=ANY_GPU)
        except ConfigError as error:
            problems += [(row.name, problem) for problem in error.problems]
    return problems


def _has_begun(folder: SweepFolder, row: Row) -> bool:
    return (folder.run(row) / "config.yaml").is_file()


def _compare_with_planned(manifest: Manifest, folder: SweepFolder, replace: bool) -> bool:
    """Whether the manifest is there already. Raises ConfigError where a different one is, and may not be replaced."""
    if not is_sweep(folder.path):
        return False
    try:
        before = read_manifest(folder)
    except ConfigError:
        if not replace:
            raise
        before = dataclasses.replace(manifest, rows=[])
        # Of rows whose plan cannot be read any more, only folders are left.
        unknown = [path.name for path in sorted(folder.runs.glob("*")) if path.name not in _names(manifest)]
        if unknown:
            raise ConfigError([f"{folder.runs}: has runs that are no rows: {named(unknown)}; move them away"]) from None
        return False
    changes = compare(before, manifest)
    if not changes:
        # But for predictions, which may have come since.
        return [row.hours for row in before.rows] == [row.hours for row in manifest.rows]
    now = {row.name: row for row in manifest.rows}
    begun = [row for row in before.rows if _has_begun(folder, row)]
    lost = [row.name for row in begun if row.name not in now or not is_same_run(row, now[row.name])]
    if not replace:
        raise ConfigError(
            [
                f"{folder.manifest}: was planned otherwise; give this sweep another sweep.name=..., or put it in the "
                "place of the other with --replace",
                *changes,
            ]
        )
    if lost:
        raise ConfigError(
            [
                f"{folder.manifest}: rows that have begun would be lost or be other runs: {named(lost)}; give this "
                "sweep another sweep.name=..., or move the folders of these runs away",
                *changes,
            ]
        )
    return False


def _names(manifest: Manifest) -> set[str]:
    return {row.name for row in manifest.rows}


def changes_since(manifest: Manifest) -> list[str]:
    """What the command that planned a sweep would plan otherwise today, one line each: its files may have changed.

    Raises ConfigError where it would plan nothing any more.
    """
    config, further = read_sweep(manifest.arguments)
    grid = expand(config, further)
    if grid.problems:
        raise ConfigError(by_text(grid.problems, len(grid.rows)))
    return compare(manifest, manifest_of(config, manifest.arguments, grid))


def machines_of(manifest: Manifest) -> SubmitConfig:
    """The machines that the runs were planned for. Raises ConfigError where the manifest has them in another form."""
    names = ("nodes", "gpus_per_node", "processes_per_node", "launch")
    return to_dataclass(SubmitConfig, {name: manifest.configuration.get(name) for name in names})


def table(rows: Sequence[Row], grid: Grid) -> str:
    """The rows for a reader, and what they come to."""
    lines = [_HEADS, *(_cells(row, grid.configs[row.name]) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    own = sum(row.own_flops for row in rows)
    runs = [row for row in rows if row.role != TRUNK]
    whole = sum(row.flops for row in runs)
    total = f"{len(runs)} runs, {own:.3g} FLOPs"
    if whole > own:
        total += f"; without their {len(rows) - len(runs)} trunks {whole:.3g}"
    hours = [row.gpu_hours for row in rows]
    if all(one is not None for one in hours):
        total += f", {sum(one for one in hours if one is not None):,.1f} GPU-hours"
    return "\n".join([*text, total])


def _cells(row: Row, config: RunConfig) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.parameters:,}",
        f"{row.tokens:,}",
        f"{row.flops:.3g}",
        f"{row.steps:,}" if row.parent_step is None else f"{row.parent_step:,} to {row.steps:,}",
        f"{config.tokens_per_step:,}",
        f"{config.optimizer.learning_rate:.3g}",
        str(row.processes),
        "-" if row.hours is None else f"{row.hours:.2f}",
    )

"""`python -m launch reproduce NAME`: plan, train, score, and put the results beside the published ones."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.reproduce.config import ReproduceConfig
from launch.reproduce.page import as_html
from launch.reproduce.plan import Trial, folder_of, plan, read_reproduction, trials_of
from launch.reproduce.table import as_text, cells
from launch.sweep.local import LocalOptions, holding, run_locally
from launch.sweep.manifest import SweepFolder
from launch.sweep.progress import DONE, progress_of
from train.evaluate.suites.command import run_suite
from train.evaluate.suites.results import FILE, read_results
from train.evaluate.suites.suites import compose_suite
from train.evaluate.target import find
from train.run_directory import write_atomically

FORMAT_VERSION = 1
PAGE, RESULTS = "reproduction.html", "reproduction.json"


def reproduce(options: argparse.Namespace) -> int:
    """Do what is still to be done of a reproduction; returns 0 when all of its runs are scored, else 1.

    Raises ConfigError for what the user must change.
    """
    config, machines, further = read_reproduction(options.name, options.overrides)
    trials = trials_of(config, further)
    # Fails here, not after hours of training.
    for suite in dict.fromkeys(tuple(task.suite) for task in config.tasks.values()):
        compose_suite(config.suite, list(suite))
    folder = folder_of(config)
    manifest = plan(config, trials, machines, ["reproduce", options.name, *options.overrides])
    if options.plan:
        _say(f"{folder.manifest}: {len(trials)} runs; the same command without --plan starts them")
        return 0
    if not options.no_training:
        run_locally(folder, manifest, machines.launch, LocalOptions(options.processes, options.minutes))
    with holding(folder):
        results, missing = _scored(config, folder, trials)
    found = cells(config, trials, results)
    _write(config, folder, found, missing)
    print(as_text(config, found))
    _say("\n".join([*missing[:10], f"{len(results)} of {len(trials)} runs scored; the page: {folder.path / PAGE}"]))
    return 0 if not missing else 1


def _scored(
    config: ReproduceConfig, folder: SweepFolder, trials: Sequence[Trial]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Results of the runs that are complete, scored where they are not yet; and what is missing, one line a run."""
    results, missing = dict[str, dict[str, Any]](), list[str]()
    for trial in trials:
        run, row = folder.run(trial.row), trial.row
        done = progress_of(folder, row)
        if done.state != DONE:
            how_far = f"{done.found['steps']:,} of {row.steps:,} steps"
            missing.append(f"{row.name}: {done.state}, {how_far} {done.why}".strip())
            continue
        overrides = config.tasks[trial.task].suite
        if (found := _stored(config, overrides, run, row.steps)) is None:
            _say(f"{row.name}: suite {config.suite}")
            run_suite(find(run), [f"suite={config.suite}", *overrides], None)
            found = _stored(config, overrides, run, row.steps)
        assert found is not None, "a suite stores what it finds"
        results[row.name] = found
    return results, missing


def _stored(config: ReproduceConfig, overrides: list[str], run: Path, steps: int) -> dict[str, Any] | None:
    """What the suite, with these settings, found at the run's last step; None: nothing yet."""
    _, settings = compose_suite(config.suite, overrides)
    wanted = json.loads(json.dumps(dataclasses.asdict(settings)))
    for line in reversed(read_results(run / FILE)):
        if (line["suite"], line.get("settings"), line.get("step")) == (config.suite, wanted, steps):
            return dict(line["results"])
    return None


def _write(config: ReproduceConfig, folder: SweepFolder, found: Sequence[Any], missing: Sequence[str]) -> None:
    table = [{**dataclasses.asdict(cell), "scaled": cell.scaled, "verdict": cell.verdict} for cell in found]
    document = {"format_version": FORMAT_VERSION, "name": config.name, "table": table, "missing": list(missing)}
    write_atomically(folder.path / RESULTS, json.dumps(document, indent=1) + "\n")
    write_atomically(folder.path / PAGE, as_html(config, found, missing))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

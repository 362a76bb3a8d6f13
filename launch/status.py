"""`python -m launch status`: how far runs are, and what the queue says of their jobs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf import ConfigError
from launch import slurm
from launch.folder import LaunchFolder
from train.run_directory import read_events
from train.run_summary import summarise

WATCH_SECONDS = 5.0
# Events that are shown of a run.
_EVENTS = 3
_COLUMNS = ("run", "queue", "state", "step", "tokens", "loss", "tokens/s", "attempts", "last events")


def show_status(path: Path, watch: bool, as_json: bool) -> int:
    """Print a table of all runs at or below `path`. Raises ConfigError where there is none."""
    while True:
        runs = [status_of(run, jobs) for jobs in [known_queue()] for run in find_runs(path)]
        if not runs:
            raise ConfigError([f"{path}: no run lies there; name a run's folder, or one that has runs below"])
        if as_json:
            print(json.dumps(runs, indent=1))
        else:
            # To the upper left corner, and nothing below.
            print(("\x1b[H\x1b[J" if watch and sys.stdout.isatty() else "") + table(runs), flush=True)
        if not watch:
            return 0
        time.sleep(WATCH_SECONDS)


def find_runs(path: Path) -> list[Path]:
    """The folders of runs at or below `path`: those that have begun, and those that were submitted."""
    found = []
    for folder, below, files in os.walk(path):
        is_run = {"config.yaml", "events.jsonl"} <= set(files)
        if is_run or (Path(folder) / "launch" / "job.json").is_file():
            found.append(Path(folder))
            # Checkpoints may have thousands of files.
            below.clear()
    return sorted(found)


def known_queue() -> list[slurm.QueuedJob] | None:
    """None where this machine has no Slurm, or it does not answer: what folders say is shown all the same."""
    try:
        return slurm.queue()
    except ConfigError as error:
        why = error.problems[0]
    except slurm.SlurmError as error:
        why = str(error)
    print(f"The queue is not known: {why}", file=sys.stderr)
    return None


def status_of(run: Path, queue: Sequence[slurm.QueuedJob] | None) -> dict[str, Any]:
    """What is known of one run, as JSON values."""
    folder = LaunchFolder(run)
    found: dict[str, Any] = {"name": run.name, "directory": str(run), "state": "not started", "steps": 0, "tokens": 0}
    found |= {"total_steps": None, "loss": None, "held_out": {}, "tokens_per_second": None, "reason": None}
    if (run / "config.yaml").is_file():
        try:
            summary = summarise(run)
            found |= {key: summary[key] for key in found if key != "directory"}
        except (OSError, ValueError) as error:
            # Others below the folder are shown all the same.
            found |= {"state": "unreadable", "reason": str(error)}
    history = folder.since_submission()
    found["attempts"] = sum(line["event"] == "begin" for line in history)
    ended = [line["reason"] for line in history if line["event"] in ("given_up", "done")]
    found["verdict"] = ended[-1] if ended else None
    numbers = folder.job_numbers()
    jobs = [job for job in queue or () if job.is_of(numbers)]
    live = [job for job in jobs if job.is_live]
    found["jobs"] = [
        {"number": job.number, "state": job.state, "reason": job.reason, "nodes": job.nodes} for job in jobs
    ]
    found["queue"] = _queue_state(live or jobs[-1:]) if numbers and queue is not None else None
    events = read_events(run)[-_EVENTS:] if (run / "events.jsonl").is_file() else []
    found["events"] = [_event(event) for event in events]
    return found


def _queue_state(jobs: Sequence[slurm.QueuedJob]) -> str:
    if not jobs:
        return "gone"
    job = jobs[0]
    why = f" ({job.reason})" if job.state == "PENDING" and job.reason != "None" else ""
    more = f" +{len(jobs) - 1}" if len(jobs) > 1 else ""
    return f"{job.number} {job.state}{why}{more}"


def _event(event: dict[str, Any]) -> str:
    step = "" if event.get("step") is None else f" {event['step']}"
    return f"{event['event']}{step}"


def table(runs: Sequence[dict[str, Any]]) -> str:
    """For a reader: a row for each run, and below it why it was given up."""
    rows = [_COLUMNS, *(_row(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [f"{run['name']}: {run['verdict']}" for run in runs if run["verdict"] is not None]
    notes += [f"{run['name']}: {run['reason']}" for run in runs if run["state"] == "unreadable"]
    return "\n".join([*lines, *notes])


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    total = "" if run["total_steps"] is None else f"/{run['total_steps']:,}"
    speed = run["tokens_per_second"]
    return (
        run["name"],
        run["queue"] or "-",
        run["state"],
        f"{run['steps']:,}{total}",
        f"{run['tokens']:,}",
        "-" if run["loss"] is None else f"{run['loss']:.4f}",
        "-" if speed is None else f"{speed:,.0f}",
        str(run["attempts"]),
        ", ".join(run["events"]) or "-",
    )

"""How far the runs of a sweep are, by their folders and the queue, and which of them are still to be started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import slurm
from launch.folder import LaunchFolder
from launch.status import known_queue, status_of
from launch.sweep.manifest import Manifest, Row, SweepFolder

DONE, RUNNING, QUEUED, FAILED, WAITING = "done", "running", "queued", "failed", "waiting"
STATES = (DONE, RUNNING, QUEUED, FAILED, WAITING)
_HEADS = ("run", "state", "step", "loss", "held out", "attempts", "queue")
# Of what a table says of a row.
_MOST = 300


@dataclass(frozen=True)
class Progress:
    """How far one row is. `found`: what `launch status` says of its run."""

    row: Row
    state: str
    # Why it failed, or waits; empty: there is nothing to say.
    why: str
    found: dict[str, Any]

    @property
    def is_hole(self) -> bool:
        """Whether it is to be started: it is not complete, and nobody is at it."""
        return self.state in (FAILED, WAITING)


def progress(folder: SweepFolder, manifest: Manifest, queue: Sequence[slurm.QueuedJob] | None = None) -> list[Progress]:
    """How far all rows are, in their order. `queue`: None where it is not known."""
    found = [progress_of(folder, row, queue) for row in manifest.rows]
    failed = {one.row.name for one in found if one.state == FAILED}
    return [
        Progress(one.row, one.state, f"its trunk {one.row.parent} failed", one.found)
        if one.state == WAITING and one.row.parent in failed
        else one
        for one in found
    ]


def queue_of(folder: SweepFolder, manifest: Manifest) -> list[slurm.QueuedJob] | None:
    """What the queue says, where runs were ever submitted to one."""
    is_submitted = any(LaunchFolder(folder.run(row)).job_numbers() for row in manifest.rows)
    return known_queue() if is_submitted else None


def progress_of(folder: SweepFolder, row: Row, queue: Sequence[slurm.QueuedJob] | None = None) -> Progress:
    """How far one row is."""
    run = folder.run(row)
    found = status_of(run, queue)
    state, why = _state(row, run, found)
    return Progress(row, state, why, found)


def _state(row: Row, run: Path, found: dict[str, Any]) -> tuple[str, str]:
    live = [job["state"] for job in found["jobs"] if job["state"] in slurm.LIVE]
    if found["state"] == "complete" and found["steps"] >= row.steps and not live:
        return DONE, ""
    if found["state"] == "running" or "RUNNING" in live:
        return RUNNING, ""
    if live:
        return QUEUED, ""
    if found["state"] == "unreadable":
        return FAILED, str(found["reason"])
    history = LaunchFolder(run).since_submission()
    if history and history[-1]["event"] == "given_up":
        return FAILED, str(history[-1]["reason"])
    if found["state"] in ("stopped", "failed", "ended without a word"):
        return WAITING, f"{found['state']} after {found['steps']:,} steps"
    return WAITING, ""


def as_json(found: Sequence[Progress]) -> list[dict[str, Any]]:
    """For programs."""
    return [
        {"row": one.row.name, "row_state": one.state, "why": one.why or None, "row_steps": one.row.steps, **one.found}
        for one in found
    ]


def table(found: Sequence[Progress]) -> str:
    """For a reader: a line for each row, how many are in each state, and what is wrong."""
    rows = [_HEADS, *(_cells(one) for one in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, summary(found), *reasons(found)])


def summary(found: Sequence[Progress]) -> str:
    """How many rows are in each state."""
    counts = {state: sum(one.state == state for one in found) for state in STATES}
    return f"{len(found)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def reasons(found: Sequence[Progress]) -> list[str]:
    """Why rows failed, one line each."""
    return [f"{one.row.name}: {one.why[:_MOST]}" for one in found if one.state == FAILED]


def _cells(one: Progress) -> tuple[str, ...]:
    held_out = [scored["loss"] for scored in one.found["held_out"].values() if scored["loss"] is not None]
    loss = one.found["loss"]
    return (
        one.row.name,
        one.state,
        f"{one.found['steps']:,}/{one.row.steps:,}",
        "-" if loss is None else f"{loss:.4f}",
        ", ".join(f"{value:.4f}" for value in held_out) or "-",
        str(one.found["attempts"]),
        one.found["queue"] or "-",
    )

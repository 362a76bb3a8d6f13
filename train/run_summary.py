"""What a run's folder says of the run: how far it is, how it fares, and what can be done with it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shlex
from pathlib import Path
from typing import Any

from conf.problems import ConfigError
from model.locate import complete_checkpoints, step_of
from train.callbacks.metrics_file import read_metrics
from train.interpreter import python_name
from train.later_formats import later_formats
from train.run_directory import RunDirectory, read_events
from train.stored_configuration import in_current_form, read_configuration

# Of the end of a run, by the event that stands last.
_ENDINGS = {"complete": "complete", "stop": "stopped", "error": "failed"}


def summarise(path: Path) -> dict[str, Any]:
    """What `path`, a run's directory, says of the run, as JSON values.

    Raises ConfigError where it is no run's directory, or a later version of this program wrote it.
    """
    directory = RunDirectory(path)
    if not directory.config.is_file():
        raise ConfigError([f"{path}: is no run's directory, it has no config.yaml"])
    if problems := later_formats(directory):
        raise ConfigError(problems)
    stored = read_configuration(directory.config)
    kinds = {"name": str, "corpus": dict, "model": dict}
    if not all(isinstance(stored.get(key), kind) for key, kind in kinds.items()):
        raise ConfigError([f"{directory.config}: is no configuration of a run, it lacks 'name', 'corpus' or 'model'"])
    config = in_current_form(stored)
    plan = _read_plan(directory.plan)
    events = read_events(path) if directory.events.is_file() else []
    lines = read_metrics(path) if directory.metrics.is_file() else []
    train = [line for line in lines if line["kind"] == "train"]
    checkpoints = complete_checkpoints(directory.checkpoints)
    last = train[-1] if train else {}
    state, reason = _state(directory, events)
    return {
        "name": config["name"],
        "directory": str(path.resolve()),
        "state": state,
        "reason": reason,
        "steps": last.get("step", 0),
        "total_steps": plan.get("total_steps"),
        "tokens": last.get("tokens", 0),
        "loss": last.get("loss"),
        "tokens_per_second": last.get("tokens_per_second"),
        "held_out": {
            line["set"]: {"step": line["step"], "loss": line["loss"]} for line in lines if line["kind"] == "evaluation"
        },
        "checkpoints": [step_of(folder) for folder in checkpoints],
        "newest_checkpoint": str(checkpoints[-1]) if checkpoints else None,
        "corpus": config["corpus"].get("directory"),
        "model": config["model"],
    }


def _read_plan(path: Path) -> dict[str, Any]:
    """What is in plan.json; nothing where it is not there, or damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_bytes()) if path.is_file() else None
        if isinstance(content, dict) and type(content.get("total_steps")) is int:
            return content
    return {}


def _state(directory: RunDirectory, events: list[dict[str, Any]]) -> tuple[str, str | None]:
    """(running, complete, stopped, failed, ended without a word, or not started; why)."""
    if directory.lock.is_file():
        with directory.lock.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return "running", file.read().strip() or None
    # What a refused second start adds says nothing of how the run ended.
    last = next((event for event in reversed(events) if event["event"] in (*_ENDINGS, "start", "resume")), None)
    if last is None:
        return "not started", None
    if last["event"] in _ENDINGS:
        return _ENDINGS[last["event"]], last.get("reason") or last.get("message")
    return "ended without a word", "the process was killed, or its machine was lost"


def as_lines(summary: dict[str, Any]) -> str:
    """The summary for a reader, with the commands that fit."""
    state = summary["state"] + (f" ({summary['reason']})" if summary["reason"] else "")
    total = "" if summary["total_steps"] is None else f" of {summary['total_steps']:,}"
    lines = [
        f"run         {summary['name']} in {summary['directory']}",
        f"state       {state}",
        f"progress    {summary['steps']:,}{total} steps, {summary['tokens']:,} tokens",
    ]
    if summary["loss"] is not None:
        lines.append(f"loss        {summary['loss']:.4f} at {summary['tokens_per_second'] or 0:,.0f} tokens/s")
    for name, held_out in summary["held_out"].items():
        if held_out["loss"] is not None:
            lines.append(f"held out    {name}: {held_out['loss']:.4f} after step {held_out['step']:,}")
    steps = ", ".join(f"{step:,}" for step in summary["checkpoints"]) or "none yet"
    lines += [f"checkpoints {steps}", f"corpus      {summary['corpus']}", "", "next"]
    path, python = shlex.quote(summary["directory"]), python_name()
    name, checkpoint = (
        shlex.quote(f"{key}={summary[of]}") for key, of in (("name", "name"), ("checkpoint", "directory"))
    )
    if summary["state"] not in ("running", "complete"):
        lines.append(f"  {python} -m train --config {path} {name}")
    if summary["checkpoints"]:
        lines += [
            f'  {python} -m model generate {checkpoint} prompt="..."',
            f"  {python} -m train.evaluate {path}",
        ]
    if summary["steps"]:
        lines.append(f"  {python} -m train.report {path}")
    return "\n".join(lines)

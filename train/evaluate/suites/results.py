"""evaluations.jsonl: what suites found, one line a suite and a model, in the run's folder.

The first line is the header, `{"kind": "header", "format_version": 1}`. Each further one (docs/training.md) is a
result; a later one of the same suite, model and settings stands for the earlier ones.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from train.evaluate.suites.base import CaseResult, SuiteResult
from train.run_directory import read_versioned_lines

FORMAT_VERSION = 1
FILE = "evaluations.jsonl"


def append_result(path: Path, line: dict[str, Any]) -> None:
    """Add a result to the file, which begins with its header. Raises OSError, ValueError for a later format."""
    if path.is_file() and path.stat().st_size:
        read_versioned_lines(path, FORMAT_VERSION)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One write of whole lines: evaluations of one run may end at the same time.
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        text = "" if size else json.dumps({"kind": "header", "format_version": FORMAT_VERSION}) + "\n"
        if size:
            file.seek(size - 1)
            # A kill cut the last line short.
            text = "" if file.read(1) == b"\n" else "\n"
        file.write((text + json.dumps(_finite(line), allow_nan=False) + "\n").encode())


def result_line(suite: str, settings: Any, result: SuiteResult, **about: Any) -> dict[str, Any]:
    """One line: the suite by the name of its file in conf/suite, its settings, its cases, and what is known of the
    model."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "suite": suite,
        **about,
        "settings": dataclasses.asdict(settings),
        "results": {name: _case(case) for name, case in result.cases.items()},
        "notes": result.notes,
    }


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results of a file, oldest first; empty where there is none. Raises ValueError for another format."""
    if not path.is_file():
        return []
    lines = read_versioned_lines(path, FORMAT_VERSION)
    return [line for line in lines[1:] if is_result(line)]


def is_result(line: dict[str, Any]) -> bool:
    """Whether a line names its suite and has the figures of cases."""
    cases = line.get("results")
    return (
        isinstance(line.get("suite"), str)
        and isinstance(cases, dict)
        and all(isinstance(figures, dict) for figures in cases.values())
    )


def newest_results(path: Path) -> dict[str, dict[str, Any]]:
    """The last result of each suite by its name."""
    return {line["suite"]: line for line in read_results(path)}


def _case(case: CaseResult) -> dict[str, Any]:
    found: dict[str, Any] = {**case.figures, "examples": case.examples}
    if case.chance is not None:
        found |= {"chance": case.chance}
    if case.scaled_accuracy is not None:
        found |= {"scaled_accuracy": case.scaled_accuracy}
    return found


def _finite(value: Any) -> Any:
    """Numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

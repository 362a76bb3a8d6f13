"""Runs that a later version of this program wrote: they are refused before anything of them is read, passed over or
written to."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from conf.problems import is_later_format, other_format
from model.locate import complete_checkpoints
from model.marker import COMPLETE
from model.weights import FORMAT_VERSION as WEIGHTS_FORMAT
from model.weights import MODEL_JSON
from train.callbacks.metrics_file import FORMAT_VERSION as METRICS_FORMAT
from train.callbacks.samples import FORMAT_VERSION as SAMPLES_FORMAT
from train.checkpoints.layout import FORMAT_VERSION as CHECKPOINT_FORMAT
from train.checkpoints.layout import STATE_JSON
from train.evaluate.suites.results import FORMAT_VERSION as SUITES_FORMAT
from train.plan import FORMAT_VERSION as PLAN_FORMAT
from train.run_directory import EVENTS_FORMAT_VERSION, RunDirectory


def later_formats(directory: RunDirectory) -> list[str]:
    """One line for each file of the run whose format is later than the one that this version knows.

    What cannot be read at all is for its readers to say.
    """
    return [
        other_format(path, found, known)
        for path, known in _versioned_files(directory)
        if is_later_format(found := _version_of(path), known)
    ]


def _versioned_files(directory: RunDirectory) -> Iterator[tuple[Path, int]]:
    yield directory.plan, PLAN_FORMAT
    yield directory.events, EVENTS_FORMAT_VERSION
    yield directory.metrics, METRICS_FORMAT
    yield directory.samples, SAMPLES_FORMAT
    yield directory.evaluations, SUITES_FORMAT
    for folder in complete_checkpoints(directory.checkpoints):
        yield folder / COMPLETE, CHECKPOINT_FORMAT
        yield folder / STATE_JSON, CHECKPOINT_FORMAT
        yield folder / "weights" / MODEL_JSON, WEIGHTS_FORMAT


def _version_of(path: Path) -> object:
    """The format_version of a JSON file, or of the header of a JSON lines file; None where it says none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        # To open a pipe would wait for ever.
        if not path.is_file():
            return None
        with path.open("rb") as file:
            content = json.loads(file.readline() if path.suffix == ".jsonl" else file.read())
        return content.get("format_version") if isinstance(content, dict) else None
    return None

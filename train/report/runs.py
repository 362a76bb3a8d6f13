"""The runs that are compared, as their folders have them: what is broken in one is named and hides nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from conf.problems import ConfigError
from train.callbacks.metrics_file import is_measurement, read_metrics
from train.evaluate.suites.results import FILE as RESULTS
from train.evaluate.suites.results import is_result, newest_results
from train.figure import column, smooth
from train.later_formats import later_formats
from train.run_directory import RunDirectory, bad_lines, read_events
from train.run_summary import summarise
from train.stored_configuration import in_current_form, read_configuration

# As many as have a style of their own that the eye can tell from the others.
MOST_RUNS = 20
_KINDS = {"train": "train", "evaluations": "evaluation", "statistics": "statistics", "profiles": "profiles"}
# What a curve is drawn over.
Axis = Literal["steps", "tokens", "FLOPs"]


@dataclass(frozen=True)
class ComparedRun:
    """One run. Lists are empty, and values None, where its folder does not say."""

    # With as many of the folders around it as tell it from the others.
    name: str
    folder: Path
    # Lines of metrics.jsonl by their kind, and of events.jsonl.
    train: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    statistics: list[dict[str, Any]] = field(default_factory=list)
    profiles: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    # In the form of this version.
    configuration: dict[str, Any] | None = None
    # What `train.run_summary.summarise` says.
    summary: dict[str, Any] | None = None
    # Documents that `python -m train.evaluate` wrote, by their steps.
    documents: list[dict[str, Any]] = field(default_factory=list)
    # The last line of evaluations.jsonl of each suite.
    suites: dict[str, dict[str, Any]] = field(default_factory=dict)
    # What in the folder is broken, one text each.
    problems: list[str] = field(default_factory=list)

    @cached_property
    def parameters(self) -> int | None:
        """Of its model; None where no configuration says."""
        return self._of_model(lambda counted, model, context: counted.count_parameters(model).total)

    @cached_property
    def flops_per_token(self) -> float | None:
        """Training FLOPs of a token, counted alike for all runs, whatever GPU they ran on."""
        return self._of_model(lambda counted, model, context: counted.training_flops_per_token(model, context))

    def _of_model(self, count: Callable[[Any, Any, int], Any]) -> Any:
        from conf import to_dataclass
        from model import accounting
        from model.config import ModelConfig

        if self.configuration is None:
            return None
        try:
            model = to_dataclass(ModelConfig, self.configuration["model"])
            return count(accounting, model, self.configuration["training"]["sequence_length"])
        except (ValueError, KeyError, TypeError):
            # Of a kind of layers that this installation does not have, or edited by hand.
            return None

    def over(self, axis: Axis, steps: np.ndarray) -> np.ndarray:
        """Where on `axis` these numbers of completed steps lie (fp64); not a number where that is not known."""
        if axis == "steps":
            return steps
        known, tokens = np.append(0.0, column(self.train, "step")), np.append(0.0, column(self.train, "tokens"))
        found = np.interp(steps, known, tokens)
        # An evaluation may come a few steps behind the last line of training.
        found += np.maximum(steps - known[-1], 0) * (tokens[-1] / max(known[-1], 1))
        return found if axis == "tokens" else found * (self.flops_per_token or np.nan)

    def held_out(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Completed steps and losses of one held-out set."""
        of_set = [line for line in self.evaluations if line["set"] == name]
        return column(of_set, "step"), column(of_set, "loss")

    def figures(self, key: str, is_smooth: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Completed steps and a figure of the training lines, as a running mean where `is_smooth`."""
        values = column(self.train, key)
        return column(self.train, "step"), smooth(values) if is_smooth and len(values) else values


def read_runs(run_directories: Sequence[Path | str]) -> list[ComparedRun]:
    """The runs of these folders; one that is named twice is one.

    Raises FileNotFoundError where a folder is not that of a run, ValueError where there are more than MOST_RUNS or a
    later version of this program wrote one.
    """
    folders = list({Path(folder).resolve(): Path(folder) for folder in run_directories}.values())
    if len(folders) > MOST_RUNS:
        raise ValueError(f"{len(folders)} runs are more than one picture shows; name at most {MOST_RUNS}")
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _read(folder: Path, name: str) -> ComparedRun:
    directory, problems = RunDirectory(folder), []
    if not directory.metrics.is_file() and not directory.config.is_file():
        raise FileNotFoundError(f"{directory.metrics}: no such file; is {folder} the folder of a run that has started?")
    if later := later_formats(directory):
        raise ConfigError(later)

    def attempt(read: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read()
        except (ConfigError, ValueError) as error:
            problems.extend(error.problems if isinstance(error, ConfigError) else [str(error)])
            return otherwise

    lines = attempt(lambda: read_metrics(folder), []) if directory.metrics.is_file() else []
    events = attempt(lambda: read_events(folder), []) if directory.events.is_file() else []
    suites = attempt(partial(newest_results, folder / RESULTS), {})
    # The header was read above, or its problem told.
    problems += bad_lines(directory.metrics, lambda line: line.get("kind") == "header" or is_measurement(line))
    problems += bad_lines(directory.events, lambda line: isinstance(line.get("event"), str))
    problems += bad_lines(folder / RESULTS, lambda line: line.get("kind") == "header" or is_result(line))
    has_configuration = directory.config.is_file()
    configuration = attempt(lambda: in_current_form(read_configuration(directory.config)), None)
    documents = [attempt(partial(_read_document, path), None) for path in _documents(folder)]
    return ComparedRun(
        name=name,
        folder=folder,
        **{name: [line for line in lines if line["kind"] == kind] for name, kind in _KINDS.items()},
        events=events,
        configuration=configuration if has_configuration else None,
        summary=attempt(lambda: summarise(folder), None) if has_configuration else None,
        suites=suites,
        documents=[document for document in documents if document is not None],
        # Readers of several files may stumble over the same one.
        problems=list(dict.fromkeys(problems)),
    )


def _documents(folder: Path) -> list[Path]:
    return sorted((folder / "evaluations").glob("*.json"))


def _read_document(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results = content["results"]
        if all(isinstance(figures, dict) for figures in results.values()):
            return {"step": content.get("step"), "results": results}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{path.parent.name}/{path.name} is not what train.evaluate writes")


def _names(folders: Sequence[Path]) -> list[str]:
    """What each folder is called, with as many of those around it as tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    names = ["/".join(parts[-1:]) for parts in paths]
    for length in range(2, max(map(len, paths), default=0) + 1):
        names = [
            "/".join(parts[-length:]) if names.count(name) > 1 else name
            for parts, name in zip(paths, names, strict=True)
        ]
    return names

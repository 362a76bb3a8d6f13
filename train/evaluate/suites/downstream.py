"""The suite `downstream`: tasks of lm-eval-harness (optional package lm-eval), asked as it asks other models."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.problems import ConfigError, at_least
from train.evaluate.suites.answers import Answers
from train.evaluate.suites.base import CaseResult, Subject, Suite, SuiteResult, SuiteSettings

_PACKAGE = "lm_eval"
# Those whose mean arXiv 2405.04517 reports.
_PAPERS_TASKS = ("lambada_openai", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande")
# Of models that have no run beside them, as lm-eval takes it for those that do not say.
_MAX_LENGTH = 2048


@dataclass(frozen=True)
class DownstreamSettings(SuiteSettings):
    """Which tasks are asked, and how."""

    # Tasks of lm-eval-harness by their names, and files of tasks of your own (task.yaml).
    tasks: list[str] = field(default_factory=lambda: list(_PAPERS_TASKS))
    # A folder of further task files, whose names `tasks` may then have.
    task_folder: str | None = None
    # Solved examples before each question; null: as many as a task asks for.
    num_fewshot: int | None = None
    # Examples of each task that are asked; null: all.
    limit: int | None = None
    # Questions that a process answers at a time.
    batch_size: int = 8
    # Tokens that the model reads at most; what is older is left out. null: training.sequence_length of the model's run,
    # or 2048.
    max_length: int | None = None
    # Of the choice of solved examples, and of what is drawn where a task asks for that.
    seed: int = 0


class DownstreamSuite(Suite[DownstreamSettings]):
    kind = "downstream"
    settings_class = DownstreamSettings

    def validate(self, settings: DownstreamSettings) -> list[str]:
        problems = []
        if importlib.util.find_spec(_PACKAGE) is None:
            problems.append(
                "suite: downstream needs the package lm-eval, which is not installed: pip install "
                "'xlstm-pretrain[evaluation]'"
            )
        if not settings.tasks:
            problems.append(
                "suite.tasks: names no task; give names of lm-eval-harness or files, suite.tasks=[NAME,...]"
            )
        for name in settings.tasks:
            if _is_file(name) and not Path(name).is_file():
                problems.append(f"suite.tasks: {name}: no such file")
        if settings.task_folder is not None and not Path(settings.task_folder).is_dir():
            problems.append(f"suite.task_folder: {settings.task_folder}: no such folder")
        return [
            *problems,
            *at_least("suite.num_fewshot", settings.num_fewshot, 0),
            *at_least("suite.limit", settings.limit, 1),
            *at_least("suite.batch_size", settings.batch_size, 1),
            *at_least("suite.max_length", settings.max_length, 2),
        ]

    def run(self, subject: Subject, settings: DownstreamSettings, folder: Path) -> SuiteResult:
        """Ask every task; a figure of the result has lm-eval's name for it.

        What is answered lies in `folder`/answers.jsonl until all is.
        """
        # lm-eval takes seconds to import, and is asked for by this suite alone.
        from lm_eval.evaluator import simple_evaluate

        from train.evaluate.suites.harness_model import HarnessModel

        max_length = settings.max_length or _trained_length(subject)
        answers = Answers(folder / "answers.jsonl", _identity(subject, settings, max_length), subject.mesh)
        model = HarnessModel(subject, answers, max_length, settings.batch_size, settings.seed)
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        found = simple_evaluate(
            model=model,
            tasks=[_file(name) if _is_file(name) else name for name in settings.tasks],
            task_manager=_task_manager(settings),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            # Of errors of means that have no formula; lm-eval's own 100,000 take minutes.
            bootstrap_iters=1000,
            log_samples=False,
            **dict.fromkeys(seeds, settings.seed),
        )
        answers.forget()
        # lm-eval gives what it found to the first process of a host alone.
        cases = subject.mesh.broadcast_object({} if found is None else _cases(found), group="world")
        notes = [f"lm-eval {importlib.metadata.version('lm-eval')}"]
        if settings.limit is not None:
            notes.append(f"of the first {settings.limit:,} examples of each task alone")
        return SuiteResult(cases, notes)


def _trained_length(subject: Subject) -> int:
    return subject.config.training.sequence_length if subject.has_run else _MAX_LENGTH


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _file(task: str) -> str:
    return str(Path(task).absolute())


def _task_manager(settings: DownstreamSettings) -> Any:
    from lm_eval.tasks import TaskManager

    names = [name for name in settings.tasks if not _is_file(name)]
    # To read the thousands of tasks that lm-eval has takes long.
    manager = TaskManager(include_path=settings.task_folder, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=settings.task_folder)
    if unknown := [name for name in names if name not in set(manager.all_tasks)]:
        raise ConfigError(
            [
                f"suite.tasks: lm-eval has no task {name}; `python -m lm_eval ls tasks` lists them, suite.task_folder "
                "adds a folder of yours"
                for name in unknown
            ]
        )
    return manager


def _cases(found: dict[str, Any]) -> dict[str, CaseResult]:
    counts = found["n-samples"]
    return {
        task: CaseResult(_figures(figures), counts.get(task, {}).get("effective", 0))
        for task, figures in found["results"].items()
    }


def _figures(found: dict[str, Any]) -> dict[str, float]:
    """lm-eval's "acc,none" as "acc"; of other filters "exact_match (strict)"."""
    figures = {}
    for key, value in found.items():
        name, _, answer_filter = key.partition(",")
        if answer_filter and isinstance(value, int | float) and not isinstance(value, bool):
            figures[name if answer_filter == "none" else f"{name} ({answer_filter})"] = float(value)
    return figures


def _identity(subject: Subject, settings: DownstreamSettings, max_length: int) -> list[Any]:
    """What answers depend on, but for what is asked: the files of the weights, and how they compute."""
    folder = subject.located.weights
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    weights = [[name, status.st_size, status.st_mtime_ns] for name, status in files]
    precision = subject.config.precision.compute
    return [os.path.realpath(folder), weights, subject.tokenizer().fingerprint, precision, max_length, settings.seed]

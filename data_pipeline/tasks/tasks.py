"""The tasks that there are, and examples of them as batches of token ids.

Axes: B batch (examples), S sequence.
"""

from __future__ import annotations

from typing import Any

from conf.problems import at_least, choice, suggestion
from conf.settings import build_settings, settings_problems
from data_pipeline.tasks.base import Task
from data_pipeline.tasks.config import SCORED, TaskConfig
from data_pipeline.tasks.expressions import BracketedArithmetic, SolveEquation
from data_pipeline.tasks.list_operations import ListOperations
from data_pipeline.tasks.recall import MultiQueryRecall
from data_pipeline.tasks.state_tracking import (
    S3,
    CycleNavigation,
    EvenPairs,
    Majority,
    MajorityCount,
    ModularArithmetic,
    Parity,
)
from data_pipeline.tasks.strings import (
    BucketSort,
    MissingDuplicate,
    OddsFirst,
    Repetition,
    ReverseString,
    Set,
    StackManipulation,
)

# In the order of tables.
FORMAL: tuple[Task[Any], ...] = (
    Parity(),
    EvenPairs(),
    CycleNavigation(),
    ModularArithmetic(),
    BracketedArithmetic(),
    SolveEquation(),
    Majority(),
    MajorityCount(),
    BucketSort(),
    MissingDuplicate(),
    OddsFirst(),
    ReverseString(),
    Set(),
    StackManipulation(),
    Repetition(),
    S3(),
)
TASKS: dict[str, Task[Any]] = {task.name: task for task in (*FORMAL, MultiQueryRecall(), ListOperations())}


def settings_of(config: TaskConfig) -> Any:
    """The task's settings in a valid `config`."""
    return build_settings(TASKS[config.name].settings_class, config.settings)


def validate_task(config: TaskConfig, longest: int, prefix: str) -> list[str]:
    """Every problem of a TaskConfig, one line each; `longest`: words that an example may have at most."""
    if config.name not in TASKS:
        return [
            f"{prefix}.name: no such task ({config.name!r}){suggestion(config.name, list(TASKS))}; choose one of "
            f"{', '.join(TASKS)}"
        ]
    task = TASKS[config.name]
    problems = choice(f"{prefix}.scored", config.scored, SCORED)
    if config.scored == "every" and not task.tracks:
        problems.append(f"{prefix}.scored: the beginnings of {config.name} have no answers (every); set it to answer")
    problems += at_least(f"{prefix}.shortest", config.shortest, 1)
    found = settings_problems(task.settings_class, config.settings)
    problems += [f"{prefix}.settings{key}: {text}" for key, text in found]
    if problems:
        return problems
    settings = settings_of(config)
    task.validate(settings, lambda key, text: problems.append(f"{prefix}.settings.{key}: {text}"))
    if problems:
        return problems
    least = max(config.shortest, task.shortest(settings))
    if longest < least:
        problems.append(f"{prefix}: examples have {least} words at least, and {longest} are asked for; ask for more")
    return problems

"""What a reproduction is: `python -m launch reproduce NAME key=value`, with conf/reproduce/NAME.yaml for its values."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from conf.problems import at_least, local_folder, positive

# Settings of a run that a reproduction makes itself -> its key to change in their place.
OWN_SETTINGS = {
    "name": "reproduce.name",
    "run_root": "reproduce.root",
    "seed": "reproduce.seeds",
    "experiment": "reproduce.experiment",
    "model": "reproduce.models",
    "optimizer.learning_rate": "reproduce.learning_rates",
    "training.total_steps": "reproduce.steps",
    "training.total_tokens": "reproduce.steps",
    "corpus.task.name": "reproduce.tasks",
    "resume_from": "nothing: the runs begin from their seeds",
    "initialise_from": "nothing: the runs begin from their seeds",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class ModelOfReproduction:
    """One architecture."""

    # A file of conf/model/.
    preset: str
    # What tables call it.
    label: str
    # Settings of all its runs.
    overrides: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TaskOfReproduction:
    """One task: what is trained on, and what is scored."""

    # Settings of all runs on it, such as corpus.task.name=parity.
    overrides: list[str]
    # Of the suite that scores them, such as suite.lengths=[40,64].
    suite: list[str] = field(default_factory=list)
    # Optimizer steps of its runs; null: those of the reproduction.
    steps: int | None = None


@dataclass(frozen=True)
class ReproduceConfig:
    """Small trainings of every model, task, learning rate and seed, each scored by a suite."""

    # The reproduction lies in <root>/<name>.
    name: str
    # A folder for reproductions.
    root: str
    # A file of conf/experiment/: what all runs share.
    experiment: str
    # Further settings of all runs; those of the command come behind.
    base: list[str]
    # By names of your own, in the order of tables.
    models: dict[str, ModelOfReproduction]
    # By names of your own, in the order of tables.
    tasks: dict[str, TaskOfReproduction]
    # Only these of the tasks; []: all.
    only_tasks: list[str]
    # Only these of the models; []: all.
    only_models: list[str]
    # A file of conf/suite/.
    suite: str
    # Peak rates; the best of them by the mean over the seeds counts, for each model and task by itself.
    learning_rates: list[float]
    # Every run with each of them.
    seeds: list[int]
    # Optimizer steps of every run whose task says nothing else.
    steps: int
    # Published results to compare with, of launch/reproduce/published.py; null: none.
    published: str | None


@dataclass(frozen=True)
class Reproduction:
    """What conf/reproduce.yaml composes."""

    reproduce: ReproduceConfig


def validate_reproduction(config: Reproduction) -> list[str]:
    """All problems that show without the runs, one line each."""
    from launch.reproduce.published import PUBLISHED

    found = config.reproduce
    problems = [
        *local_folder("reproduce.root", found.root),
        *at_least("reproduce.steps", found.steps, 1),
        *(
            problem
            for name, task in found.tasks.items()
            for problem in at_least(f"reproduce.tasks.{name}.steps", task.steps, 1)
        ),
        *(problem for rate in found.learning_rates for problem in positive("reproduce.learning_rates", rate)),
    ]
    for key, names in (("name", [found.name]), ("models", list(found.models)), ("tasks", list(found.tasks))):
        problems += [
            f"reproduce.{key}: becomes the name of a folder; use letters, digits, _, - and . ({name!r})"
            for name in names
            if not _NAME.fullmatch(name)
        ]
    for key, chosen, known in (
        ("only_tasks", found.only_tasks, found.tasks),
        ("only_models", found.only_models, found.models),
    ):
        problems += [
            f"reproduce.{key}: there is no such one ({name}); choose among {', '.join(known)}"
            for name in chosen
            if name not in known
        ]
    for key in ("models", "tasks", "learning_rates", "seeds"):
        values = list(getattr(found, key))
        if not values:
            problems.append(f"reproduce.{key}: empty, so there are no runs; name at least one")
        problems += [
            f"reproduce.{key}: {value} is there twice" for value in dict.fromkeys(values) if values.count(value) > 1
        ]
    if found.published is not None and found.published not in PUBLISHED:
        problems.append(
            f"reproduce.published: no such results ({found.published!r}); choose one of {', '.join(PUBLISHED)}"
        )
    settings = [("reproduce.base", found.base)]
    settings += [(f"reproduce.models.{name}.overrides", model.overrides) for name, model in found.models.items()]
    return problems + [problem for key, values in settings for problem in owned_settings(key, values)]


def owned_settings(key: str, settings: list[str]) -> list[str]:
    """Those of `settings` that a reproduction makes itself, one line each."""
    names = {setting: setting.lstrip("+~").partition("=")[0] for setting in settings}
    return [
        f"{key}: {setting} is made by the reproduction; change {OWN_SETTINGS[name]}"
        for setting, name in names.items()
        if name in OWN_SETTINGS
    ]

"""The runs of a reproduction, as the manifest of a sweep: `launch sweep` starts them, here or on a cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf import ConfigError, compose
from launch.job import SubmitConfig, is_of_machines, validate_machines
from launch.reproduce.config import (
    ModelOfReproduction,
    ReproduceConfig,
    Reproduction,
    TaskOfReproduction,
    owned_settings,
    validate_reproduction,
)
from launch.scaling.flops import run_flops
from launch.sweep.manifest import (
    RUN,
    Manifest,
    Row,
    SweepFolder,
    by_text,
    compare,
    is_sweep,
    read_manifest,
    write_manifest,
)
from model.accounting import count_parameters
from train.config import RunConfig
from train.plan import ANY_GPU
from train.requirements import open_requirements
from train.validate import validate


@dataclass(frozen=True)
class Trial:
    """One run: the row of the manifest, and what of the reproduction it is."""

    row: Row
    model: str
    task: str
    learning_rate: float
    seed: int


def read_reproduction(name: str, arguments: Sequence[str]) -> tuple[ReproduceConfig, SubmitConfig, list[str]]:
    """The reproduction of conf/reproduce/`name`.yaml, the machines of each run on a cluster, and the settings in
    `arguments` that are of every run.

    Raises ConfigError with all problems that show without the runs.
    """
    own = [one for one in arguments if one.lstrip("+~").startswith("reproduce.")]
    of_machines = [one for one in arguments if is_of_machines(one)]
    further = [one for one in arguments if one not in own and one not in of_machines]
    owned = owned_settings("the command", further)
    config = compose(
        Reproduction, "reproduce", [f"reproduce={name}", *own], lambda rest: [*validate_reproduction(rest), *owned]
    )
    # Each run is so small that one GPU does it.
    machines = compose(SubmitConfig, "submit", ["nodes=1", "gpus_per_node=1", *of_machines], validate_machines)
    if problems := [*validate_reproduction(config), *owned, *validate_machines(machines)]:
        raise ConfigError(problems)
    return config.reproduce, machines, further


def trials_of(config: ReproduceConfig, further: Sequence[str]) -> list[Trial]:
    """Every run, each validated as a run of one process. Raises ConfigError with the problems of all."""
    trials: list[Trial] = []
    problems: list[tuple[str, str]] = []
    for name, model, task_name, task in _pairs(config):
        shared = [f"experiment={config.experiment}", f"model={model.preset}", *config.base, *task.overrides]
        shared += [*model.overrides, *further, f"training.total_steps={task.steps or config.steps}"]
        for rate in config.learning_rates:
            for seed in config.seeds:
                row_name = f"{name}-{task_name}-{rate:g}-s{seed}"
                overrides = [*shared, f"optimizer.learning_rate={rate!r}", f"seed={seed}"]
                try:
                    run = compose(RunConfig, "train", [*overrides, f"name={row_name}"])
                    open_requirements(
                        dataclasses.replace(run, run_root=str(folder_of(config).runs)), 1, elsewhere=ANY_GPU
                    )
                except ConfigError as error:
                    problems += [(row_name, problem) for problem in error.problems]
                    continue
                problems += [(row_name, problem) for problem in validate(run, 1)]
                trials.append(Trial(_row(row_name, name, run, overrides), name, task_name, rate, seed))
    if problems:
        raise ConfigError(by_text(problems, len(trials)))
    return trials


def _pairs(config: ReproduceConfig) -> Iterator[tuple[str, ModelOfReproduction, str, TaskOfReproduction]]:
    for task_name, task in config.tasks.items():
        for name, model in config.models.items():
            if name in (config.only_models or [name]) and task_name in (config.only_tasks or [task_name]):
                yield name, model, task_name, task


def _row(name: str, family: str, run: RunConfig, overrides: list[str]) -> Row:
    steps = run.total_steps
    flops = run_flops(run.model, run.training.sequence_length, float(steps * run.tokens_per_step))
    return Row(
        name=name,
        role=RUN,
        family=family,
        context=run.training.sequence_length,
        seed=run.seed,
        parameters=count_parameters(run.model).total,
        steps=steps,
        tokens=steps * run.tokens_per_step,
        flops=flops,
        own_flops=flops,
        budget=None,
        parent=None,
        parent_step=None,
        overrides=overrides,
        nodes=1,
        processes=1,
        hours=None,
    )


def folder_of(config: ReproduceConfig) -> SweepFolder:
    """Where the reproduction lies."""
    return SweepFolder(Path(config.root) / config.name)


def plan(config: ReproduceConfig, trials: Sequence[Trial], machines: SubmitConfig, arguments: list[str]) -> Manifest:
    """Write the manifest, unless it is there already. Raises ConfigError where a different one is."""
    folder = folder_of(config)
    configuration = {**dataclasses.asdict(config), **dataclasses.asdict(machines)}
    manifest = Manifest(config.name, arguments, configuration, [trial.row for trial in trials], [])
    if not is_sweep(folder.path):
        write_manifest(manifest, folder)
    elif changes := compare(read_manifest(folder), manifest):
        raise ConfigError(
            [f"{folder.manifest}: was planned otherwise; give this reproduction another reproduce.name=...", *changes]
        )
    return manifest

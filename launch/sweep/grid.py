"""From a sweep's configuration to its rows: every family, size, context, seed and budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from conf import ConfigError, compose
from launch.job import SubmitConfig
from launch.scaling.flops import run_flops
from launch.sweep.config import FamilyConfig, SizeConfig, SweepConfig, SweepPlanConfig
from launch.sweep.manifest import BRANCH, RUN, TRUNK, LeftOut, Row
from launch.sweep.settings import replaced, typed
from launch.sweep.sizes import Measures, measures_of, rule_value, settings_of_size, short
from train.config import RunConfig
from train.schedule import duration_in_steps
from train.validate import validate

# Digits of a learning rate.
_DIGITS = 4


@dataclass
class Grid:
    """What a sweep's configuration comes to."""

    rows: list[Row] = field(default_factory=list)
    # Name of a row -> the run as it would be without its trunk.
    configs: dict[str, RunConfig] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    # (what it is about, problem)
    problems: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Model:
    """A family at one size, with one context and seed: what the lengths of its runs share."""

    family: str
    name: str
    config: RunConfig
    measures: Measures
    machines: SubmitConfig
    # Settings, from the model to the seed.
    overrides: list[str]

    @property
    def processes(self) -> int:
        per_node = self.machines.processes_per_node or self.machines.gpus_per_node
        return self.machines.nodes * per_node

    @property
    def token_flops(self) -> float:
        return run_flops(self.config.model, self.config.training.sequence_length, 1.0)


@dataclass(frozen=True)
class _Length:
    """One run of a model: how long it is, and what follows from that."""

    label: str
    budget: float | None
    steps: int
    settings: dict[str, Any]


def expand(config: SweepPlanConfig, further: Sequence[str] = ()) -> Grid:
    """All rows of a valid sweep, each validated as a run on its machines; files are not looked at.

    `further`: settings of every run that the command adds to those of the sweep.
    """
    grid = Grid()
    for model in _models(config, further, grid):
        lengths = list(_lengths(config.sweep, model, grid))
        reuse = config.sweep.reuse
        if reuse is not None and len(lengths) > 1:
            _add_branches(config.sweep, model, lengths, grid)
            continue
        for length in lengths:
            settings = dict(length.settings)
            if reuse is not None:
                warmup = max(1, round(reuse.warmup * length.steps))
                settings |= _decaying(config.sweep, length.steps, warmup)
            _add(grid, model, length, RUN, settings)
    _refuse_repeated(grid)
    return grid


def _models(config: SweepPlanConfig, further: Sequence[str], grid: Grid) -> Iterator[_Model]:
    sweep, composed = config.sweep, dict[tuple[str, ...], RunConfig | None]()
    for name, family in sweep.families.items():
        for number, size in enumerate(family.sizes or sweep.sizes):
            chosen = (f"model={size.preset or family.model}", *sweep.base, *family.overrides, *further)
            if chosen not in composed:
                composed[chosen] = _composed(name, chosen, grid)
            if (base := composed[chosen]) is None:
                continue
            try:
                settings = _sized(base, size, family, sweep)
            except ValueError as error:
                grid.problems.append((f"{name}, size {number + 1}", str(error)))
                continue
            for context in sweep.contexts:
                for seed in sweep.seeds:
                    own = settings | {"training.sequence_length": context, "seed": seed}
                    yield _model(config, name, replaced(base, own), [*chosen, *typed(own)])


def _composed(family: str, chosen: Sequence[str], grid: Grid) -> RunConfig | None:
    """The run that a family's settings give, of no length yet; None after adding to the problems."""
    try:
        return compose(
            RunConfig, "train", [*chosen, "name=NAME", "training.total_steps=1", "training.total_tokens=null"]
        )
    except ConfigError as error:
        grid.problems += [(family, problem) for problem in error.problems]
        return None


def _sized(base: RunConfig, size: SizeConfig, family: FamilyConfig, sweep: SweepConfig) -> dict[str, Any]:
    found = settings_of_size(base.model, size, family.shape or sweep.shape)
    return {f"model.{key}": value for key, value in found.items()}


def _model(config: SweepPlanConfig, family: str, run: RunConfig, overrides: list[str]) -> _Model:
    sweep, measures = config.sweep, measures_of(run.model)
    name = f"{family}-{short(measures.parameters)}"
    name += f"-t{run.training.sequence_length}" if len(sweep.contexts) > 1 else ""
    name += f"-s{run.seed}" if len(sweep.seeds) > 1 else ""
    larger = [rule for rule in sweep.larger if measures.parameters >= rule.parameters]
    nodes = max(larger, key=lambda rule: rule.parameters).nodes if larger else config.nodes
    machines = SubmitConfig(nodes, config.gpus_per_node, config.processes_per_node, config.launch)
    return _Model(family, name, run, measures, machines, overrides)


def _lengths(sweep: SweepConfig, model: _Model, grid: Grid) -> Iterator[_Length]:
    """The runs of a model, shortest first. Those of budgets that the sweep's limits leave out are noted."""
    parameters, found = model.measures.parameters, list[_Length]()
    wanted: list[tuple[str, float | None, float]] = [
        (_label(budget), budget, budget / model.token_flops) for budget in sweep.budgets
    ]
    wanted += [(f"{ratio:g}tpp", None, ratio * parameters) for ratio in sweep.tokens_per_parameter]
    least, most = sweep.least_tokens_per_parameter, sweep.most_tokens_per_parameter
    for label, budget, tokens in wanted:
        ratio, name = tokens / parameters, f"{model.name}-{label}"
        if budget is not None and not (least or 0.0) <= ratio <= (most or math.inf):
            key = "least" if ratio < (least or 0.0) else "most"
            grid.left_out.append(LeftOut(name, f"{key}_tokens_per_parameter", ratio))
            continue
        settings = _batch_and_rate(sweep, model, tokens)
        run = replaced(model.config, settings)
        steps = round(tokens / run.tokens_per_step)
        if steps < sweep.least_steps:
            grid.problems.append(
                (
                    name,
                    f"{tokens:,.0f} tokens are {steps} steps of {run.tokens_per_step:,}, fewer than "
                    f"sweep.least_steps={sweep.least_steps}; use a smaller batch or a larger budget, or leave it out "
                    "with sweep.least_tokens_per_parameter",
                )
            )
            continue
        found.append(_Length(label, budget, steps, settings))
    yield from sorted(found, key=lambda one: one.steps)


def _label(budget: float) -> str:
    mantissa, _, exponent = f"{float(f'{budget:.3g}'):e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _batch_and_rate(sweep: SweepConfig, model: _Model, tokens: float) -> dict[str, Any]:
    """The settings that the sweep's rules give a run of so many tokens."""
    measures = replace(model.measures, flops=tokens * model.token_flops)
    training, parallel = model.config.training, model.config.parallel
    replicas = max(1, model.processes // max(1, parallel.pipeline * parallel.sequence))
    settings: dict[str, Any] = {}
    samples = training.global_batch_size
    if sweep.batch_tokens is not None:
        wanted = rule_value(sweep.batch_tokens, measures) / training.sequence_length
        samples = max(1, round(wanted / replicas)) * replicas
        settings["training.global_batch_size"] = samples
    if sweep.micro_batch_tokens is not None:
        each = max(1, samples // replicas)
        fitting = [size for size in range(1, each + 1) if each % size == 0]
        room = [size for size in fitting if size * training.sequence_length <= sweep.micro_batch_tokens]
        settings["training.micro_batch_size"] = max(room, default=1)
    rule = sweep.families[model.family].learning_rate or sweep.learning_rate
    if rule is not None:
        settings["optimizer.learning_rate"] = float(f"{rule_value(rule, measures):.{_DIGITS}g}")
    return settings


def _decaying(sweep: SweepConfig, steps: int, warmup: int) -> dict[str, Any]:
    """The schedule of a run whose rate falls at its end."""
    assert sweep.reuse is not None
    return {
        "schedule.kind": "wsd",
        "schedule.warmup": warmup,
        "schedule.decay": max(1, round(sweep.reuse.decay * steps)),
        "schedule.decay_shape": sweep.reuse.decay_shape,
        "schedule.final_factor": 0.0,
        "schedule.cooldown": None,
    }


def _add_branches(sweep: SweepConfig, model: _Model, lengths: Sequence[_Length], grid: Grid) -> None:
    """The trunk, then a branch for each length. `lengths`: shortest first, with the same batch and rate."""
    assert sweep.reuse is not None
    warmup = max(1, round(sweep.reuse.warmup * lengths[0].steps))
    schedules = [_decaying(sweep, length.steps, warmup) for length in lengths]
    leaves = [length.steps - schedule["schedule.decay"] for length, schedule in zip(lengths, schedules, strict=True)]
    constant = {"kind": "constant", "warmup": warmup, "decay": None, "decay_shape": None, "final_factor": None}
    settings = {f"schedule.{key}": value for key, value in {**constant, "cooldown": None}.items()}
    settings |= lengths[0].settings | {"checkpoint.keep_at": sorted(set(leaves))}
    trunk = _add(grid, model, _Length("trunk", None, leaves[-1], {}), TRUNK, settings)
    for length, schedule, step in zip(lengths, schedules, leaves, strict=True):
        _add(grid, model, length, BRANCH, length.settings | schedule, trunk, step)


def _add(
    grid: Grid,
    model: _Model,
    length: _Length,
    role: str,
    settings: dict[str, Any],
    parent: Row | None = None,
    step: int = 0,
) -> Row:
    """Add a row, and what is wrong with it."""
    name = f"{model.name}-{length.label}"
    settings = settings | {"training.total_steps": length.steps, "training.total_tokens": None}
    config = replaced(model.config, settings | {"name": name})
    step_flops = config.tokens_per_step * model.token_flops
    row = Row(
        name=name,
        role=role,
        family=model.family,
        context=config.training.sequence_length,
        seed=config.seed,
        parameters=round(model.measures.parameters),
        steps=length.steps,
        tokens=length.steps * config.tokens_per_step,
        flops=length.steps * step_flops,
        own_flops=(length.steps - step) * step_flops,
        budget=length.budget,
        parent=None if parent is None else parent.name,
        parent_step=None if parent is None else step,
        overrides=[*model.overrides, *typed(settings)],
        nodes=model.machines.nodes,
        processes=model.processes,
        hours=None,
    )
    grid.rows.append(row)
    grid.configs[name] = config
    grid.problems += [(name, problem) for problem in validate(config, model.processes)]
    return row


def check_warmups(grid: Grid, longest: float) -> list[tuple[str, str]]:
    """(row, problem) of every run whose warm-up takes more than the share `longest` of its steps."""
    problems = []
    for row in grid.rows:
        warmup = duration_in_steps(grid.configs[row.name].schedule.warmup, row.steps)
        if row.role != TRUNK and warmup > longest * row.steps:
            problems.append(
                (
                    row.name,
                    f"schedule.warmup: {warmup:,} of {row.steps:,} steps are a greater share than "
                    f"sweep.longest_warmup={longest:g}; set schedule.warmup to a share of the run, such as 0.02",
                )
            )
    return problems


def _refuse_repeated(grid: Grid) -> None:
    """Note runs that another row does already: two sizes, or two lengths, that come to the same."""
    names = [row.name for row in grid.rows]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        grid.problems.append((name, "two runs of the sweep have this name: their sizes are nearly the same"))
    first: dict[tuple[str, ...], str] = {}
    for row in grid.rows:
        same = first.setdefault((*sorted(row.overrides), row.role), row.name)
        if same != row.name:
            grid.problems.append((row.name, f"is the same run as {same}; leave one of them out"))

"""`python -m launch plan nodes=16 gpus_per_node=8 experiment=...`: compose, check, plan, and say."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from conf import ConfigError, compose
from conf.problems import at_least, choice, positive
from launch.planner.errors import errors_of
from launch.planner.layouts import all_layouts, layout_of, room_of
from launch.planner.text import page, table
from train.command import Command, compose_run
from train.config import RunConfig
from train.estimate.calibration import SHIPPED, read_calibration, shipped
from train.estimate.machine import Machine
from train.validate import validate

FORMAT_VERSION = 1
# What a plan does not depend on, and a run must be given.
_OF_ANY_RUN = {"name": "plan", "corpus.directory": "corpus"}


@dataclass(frozen=True)
class PlanConfig:
    """The machines that a run is planned for, beside the configuration of the run: both are given in one command."""

    # Machines.
    nodes: int
    # Of each node.
    gpus_per_node: int
    # What kind of GPU; a calibration of this name comes with the package (train/estimate/calibrations).
    gpu: str
    # A file of `python -m launch calibrate` to plan by, in the place of that of `gpu`; null: that of `gpu`.
    calibration: str | None
    # Of the network between nodes, in Gbit/s for each GPU of a node. Used where no collective between nodes was
    # measured.
    network_gbit: float
    # How many of the layouts that work are shown, the fastest first; 0: none is looked for.
    layouts: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Planning:
    """What `python -m launch plan` is given."""

    arguments: Sequence[str]
    # A run's configuration that the arguments are put on top of.
    base: Path | None = None
    as_json: bool = False


def show_plan(given: Planning) -> int:
    """Print the plan; returns the exit code, 0 also where the run does not fit.

    Raises ConfigError with all problems of the command.
    """
    machines, config = read_arguments(given.arguments, given.base)
    path = SHIPPED / f"{machines.gpu}.json" if machines.calibration is None else Path(machines.calibration)
    machine = Machine(read_calibration(path), machines.nodes, machines.ranks, machines.network_gbit)
    chosen = layout_of(config, machine)
    others = all_layouts(config, machine) if machines.layouts else []
    errors = errors_of(machine.calibration)
    if given.as_json:
        content = {
            "format_version": FORMAT_VERSION,
            "machines": asdict(machines),
            "room_bytes": room_of(machine),
            "fits": chosen.fits,
            "plan": chosen.plan.as_dict(),
            "tokens_per_second_per_gpu": chosen.plan.tokens_per_second_per_device,
            "gpu_hours": (chosen.plan.predicted_seconds or 0.0) / 3600 * machines.ranks,
            "coefficients": asdict(machine.coefficients),
            "errors": asdict(errors),
            "layouts": [layout.as_dict() for layout in others],
        }
        print(json.dumps(content, indent=1))
        return 0
    print(page(config, machine, chosen, errors))
    if others:
        print(f"\n{table(chosen, others, machines.layouts)}")
    return 0


def read_arguments(arguments: Sequence[str], base: Path | None = None) -> tuple[PlanConfig, RunConfig]:
    """Sort the settings of a command into those of machines and of the run. Raises ConfigError with all problems."""
    of_machines = [argument for argument in arguments if _key(argument) in PlanConfig.__dataclass_fields__]
    overrides = [argument for argument in arguments if _key(argument) not in PlanConfig.__dataclass_fields__]
    problems: list[str] = []
    machines = None
    try:
        machines = compose(PlanConfig, "plan", of_machines, validate_machines)
        problems += validate_machines(machines)
    except ConfigError as error:
        problems += error.problems
    # Of how many processes a run would be may not be known: what else is wrong with it does not depend on that.
    ranks = 1 if machines is None or problems else machines.ranks
    try:
        config = _compose_run(overrides, base, ranks)
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if not problems:
        problems += validate(config, ranks) + _unmeasured(config)
    if problems or machines is None:
        raise ConfigError(problems)
    return machines, config


def _unmeasured(config: RunConfig) -> list[str]:
    if config.precision.is_bf16:
        return []
    return [
        f"precision.compute: products were measured in bf16, not in {config.precision.compute}; plan with "
        "precision=bf16, or see the memory of this run with python -m train --plan"
    ]


def _compose_run(overrides: list[str], base: Path | None, ranks: int) -> RunConfig:
    given = {_key(override) for override in overrides}
    if base is not None and "name" not in given:
        overrides = [*overrides, f"name={_OF_ANY_RUN['name']}"]
    try:
        return compose_run(Command(overrides, config=base), ranks)
    except ConfigError as error:
        missing = [key for key in _OF_ANY_RUN if any(line.startswith(f"{key}: a value is") for line in error.problems)]
        if not missing:
            raise
    return compose_run(Command([*overrides, *(f"{key}={_OF_ANY_RUN[key]}" for key in missing)], config=base), ranks)


def _key(argument: str) -> str:
    return argument.lstrip("+~").partition("=")[0].replace("-", "_")


def validate_machines(config: PlanConfig) -> list[str]:
    """All problems of what is asked for, one line each."""
    problems = [
        *at_least("nodes", config.nodes, 1),
        *at_least("gpus_per_node", config.gpus_per_node, 1),
        *positive("network_gbit", config.network_gbit),
        *at_least("layouts", config.layouts, 0),
    ]
    if not math.isfinite(config.network_gbit):
        problems.append(f"network_gbit: must be a number ({config.network_gbit})")
    if config.calibration is None:
        unknown = choice("gpu", config.gpu, shipped(), "calibration")
        problems += [f"{line}, or measure yours: python -m launch calibrate" for line in unknown]
    return problems

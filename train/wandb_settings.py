"""Where Weights & Biases is to put a run, and in which mode: what can be said without a network."""

from __future__ import annotations

import math
from collections.abc import Mapping

from conf.problems import between, choice
from train.config import WandbConfig

REACH_SECONDS = 30.0
WANDB_MODES = ("auto", "offline", "online", "disabled")
# W&B's own names for modes in its environment variable.
_MODES_OF_VARIABLE = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
# They would end a part of the address under which W&B shows a run.
_NOT_IN_NAMES = "/\\#?%:\r\n"


def validate_wandb(settings: WandbConfig, prefix: str) -> list[str]:
    """What W&B would refuse when a run starts, by its own rules, one line each. Pure."""
    problems = choice(f"{prefix}.mode", settings.mode, WANDB_MODES)
    problems += _validate_name(f"{prefix}.project", settings.project)
    if settings.entity is not None:
        problems += _validate_name(f"{prefix}.entity", settings.entity)
    for index, tag in enumerate(settings.tags):
        problems += between(f"{prefix}.tags[{index}]", len(tag), 1, 64, "characters")
    return problems


def _validate_name(key: str, name: str) -> list[str]:
    if not name.strip() or name != name.strip():
        return [f"{key}: empty, or with space at an end ({name!r}); give a name"]
    if found := "".join(character for character in _NOT_IN_NAMES if character in name):
        return [f"{key}: W&B allows none of / \\ # ? % : and line ends in it ({name!r} has {found!r})"]
    return between(key, len(name), 1, 128, "characters")


def wandb_variable_problems(settings: WandbConfig, variables: Mapping[str, str]) -> list[str]:
    """What is wrong with the environment's `variables` that decide on W&B, one line each."""
    problems = []
    if settings.mode == "auto" and (mode := variables.get("WANDB_MODE")):
        problems += choice("environment variable WANDB_MODE", mode, _MODES_OF_VARIABLE, "mode")
    if not reach_seconds(variables) > 0:
        seconds = variables["WANDB_INIT_TIMEOUT"]
        problems.append(f"environment variable WANDB_INIT_TIMEOUT: must be a positive number of seconds ({seconds!r})")
    return problems


def reach_seconds(variables: Mapping[str, str]) -> float:
    """How long a run waits at its start for W&B's server; nan where WANDB_INIT_TIMEOUT is no number."""
    try:
        return float(variables.get("WANDB_INIT_TIMEOUT") or REACH_SECONDS)
    except ValueError:
        return math.nan


def wandb_mode(settings: WandbConfig, variables: Mapping[str, str]) -> str:
    """online, offline or disabled. auto is what WANDB_MODE says; without it online where there is a WANDB_API_KEY."""
    if settings.mode != "auto":
        return settings.mode
    if variable := variables.get("WANDB_MODE"):
        return _MODES_OF_VARIABLE[variable]
    return "online" if variables.get("WANDB_API_KEY") else "offline"

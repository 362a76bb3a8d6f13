"""What `python -m train.evaluate` evaluates: a model that a user names, and the run that it is of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from conf import ConfigError, compose
from conf.problems import choice
from model.locate import Located, locate
from model.weights import WeightsError
from train.command import read_run_config
from train.config import PRECISIONS, RunConfig


@dataclass(frozen=True)
class Target:
    """What is evaluated, and what is known of it."""

    path: Path
    located: Located

    @property
    def checkpoint(self) -> Path | None:
        return self.located.checkpoint

    @property
    def run(self) -> Path | None:
        """The run that it is of, where that has left its configuration."""
        run = self.located.run
        return run if run is not None and (run / "config.yaml").is_file() else None

    @property
    def run_configuration(self) -> DictConfig | None:
        """The run's configuration; None where there is no run. Raises ConfigError."""
        return None if self.run is None else read_run_config(self.run)


def find(path: Path) -> Target:
    """The model that `path` means (model/locate.py). Raises ConfigError."""
    try:
        return Target(path, locate(path))
    except WeightsError as error:
        raise ConfigError([str(error)]) from None


def compose_for(target: Target, overrides: list[str], check: Callable[[RunConfig], list[str]]) -> RunConfig:
    """The configuration of the target's run, or the defaults, with `overrides`. Raises ConfigError.

    `check`: finds the problems of a configuration.
    """
    if changed := [one for one in overrides if one.lstrip("+~").partition("=")[0].split(".")[0] in ("model", "name")]:
        raise ConfigError([f"{one}: the model is evaluated as it is; leave this out" for one in changed])
    base = target.run_configuration
    if base is None:
        overrides = ["name=evaluation", *overrides]
    config = compose(RunConfig, "train", overrides, check, base)
    problems = [*check(config), *choice("precision.compute", config.precision.compute, PRECISIONS)]
    if problems:
        raise ConfigError(problems)
    return config

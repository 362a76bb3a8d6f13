"""What a command that starts runs is given, `[--plan] [--config FILE] key=value ...`, as a configuration."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from conf import ConfigError, compose
from conf.passwords import without_passwords
from train.config import RunConfig
from train.data import describe_data
from train.memory_check import Room, memory_warnings
from train.requirements import open_requirements
from train.stored_configuration import as_yaml, in_current_form, read_configuration
from train.validate import validate


@dataclass(frozen=True)
class Command:
    """The arguments of a command."""

    overrides: list[str]
    # Show what a run would be, and start none.
    plan: bool = False
    # The configuration that overrides are put on top of; None: conf/train.yaml.
    config: Path | None = None

    @property
    def arguments(self) -> list[str]:
        """As they are typed."""
        return [*(["--config", str(self.config)] if self.config else []), *self.overrides]


def parse(arguments: Sequence[str]) -> Command:
    """Sort arguments. Raises ConfigError for an option without its value."""
    rest, overrides, plan, config = list(arguments), [], False, None
    while rest:
        argument = rest.pop(0)
        option, _, value = argument.partition("=")
        if argument == "--plan":
            plan = True
        elif option == "--config":
            value = value or (rest.pop(0) if rest else "")
            if not value:
                raise ConfigError(["--config: name the config.yaml of a run, or the run's directory"])
            config = Path(value)
        else:
            overrides.append(argument)
    return Command(overrides, plan, config)


def compose_run(command: Command, processes: int) -> RunConfig:
    """The configuration that `command` asks for. Raises ConfigError with every problem."""
    base = None if command.config is None else read_run_config(command.config)
    if base is not None and not any(override.startswith("name=") for override in command.overrides):
        name = base.get("name")
        raise ConfigError(
            [f"name: {command.config} gives a new run its values; give name=NAME (name={name} goes on with that run)"]
        )
    return compose(RunConfig, "train", command.overrides, lambda rest: validate(rest, processes), base)


def read_run_config(path: Path) -> DictConfig:
    """What a run's config.yaml says, of any version of this program. `path`: the file, or the run's directory.

    Raises ConfigError where there is none or it is no configuration.
    """
    file = path / "config.yaml" if path.is_dir() else path
    try:
        stored = read_configuration(file)
    except ConfigError as error:
        raise ConfigError(
            [f"{problem}; name a run's directory or its config.yaml" for problem in error.problems]
        ) from None
    return OmegaConf.create(in_current_form(stored))


def show_plan(config: RunConfig, processes: int) -> None:
    """Print what a run of `config` would be: the configuration on standard output, the plan on standard error.

    Nothing is left behind. Raises as `open_requirements` does where the run could not start.
    """
    found = open_requirements(config, processes)
    print(as_yaml(config), end="")
    sys.stdout.flush()
    folder = "goes on in" if found.directory.config.exists() else "would begin in"
    lines = [
        found.plan.describe(),
        describe_data(config, found.plan, found.stream),
        *memory_warnings(config, found.plan, Room.here(processes)),
    ]
    lines.append(f"the run    {folder} {found.directory.path}; nothing was started")
    print(without_passwords("\n".join(lines)), file=sys.stderr)

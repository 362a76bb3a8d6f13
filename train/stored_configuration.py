"""Configurations of a run as its folder keeps them, and how they differ: what today's changes of the last one's."""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.passwords import without_passwords
from conf.problems import ConfigError
from model.stored import with_current_keys
from train.config import RunConfig
from train.run_directory import RunDirectory

# Texts that name a place, not what is there.
_PLACES = ("directory", "path", "run_root")


def as_json(config: RunConfig) -> dict[str, Any]:
    """`config` as JSON gives it back, without the passwords of its URLs."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return without_passwords(values)


def as_yaml(config: RunConfig) -> str:
    """`config` as a config.yaml, without the passwords of its URLs."""
    return OmegaConf.to_yaml(OmegaConf.create(as_json(config)))


def read_configuration(path: Path) -> dict[str, Any]:
    """A config.yaml of any version, as it stands there. Raises ConfigError where it cannot be read as one."""
    try:
        if path.exists() and not path.is_file():
            # To open a pipe would wait for ever.
            raise ConfigError([f"{path}: cannot be read (it is no regular file)"])
        stored: Any = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror})"]) from None
    # YAML's own errors, and those of the numbers and dates in it.
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"{path}: is no YAML ({' '.join(str(error).split())})"]) from None
    if not isinstance(stored, dict):
        raise ConfigError([f"{path}: holds no keys and values"])
    return typing.cast(dict[str, Any], stored)


def configuration_before(directory: RunDirectory) -> tuple[dict[str, Any] | None, list[str]]:
    """The configuration of a run's last start, in the form of this version, and what is wrong with files of it.

    A crash of the machine may leave config.yaml full of zeros; each attempt's is kept once more. None where no file
    that can be read says what it was.
    """
    problems = []
    kept = (file for file in directory.configurations.glob("*.yaml") if file.stem.isdecimal())
    files = sorted(kept, key=lambda file: int(file.stem), reverse=True)
    for file in ([directory.config] if os.path.lexists(directory.config) else []) + files:
        try:
            stored = read_configuration(file)
        except ConfigError as error:
            problems += error.problems
            continue
        if isinstance(stored.get("name"), str) and isinstance(stored.get("model"), dict):
            return in_current_form(stored), problems
        problems.append(f"{file}: is no configuration of a run, it lacks 'name' or 'model'")
    return None, problems


def in_current_form(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that any version stored, with the keys of this one and the default of what it lacks.

    Without the passwords of its URLs, which earlier versions kept.
    """
    model = stored.get("model") or {}
    stored = {**stored, "model": with_current_keys(model) if isinstance(model, Mapping) else model}
    return without_passwords(typing.cast(dict[str, Any], json.loads(json.dumps(_with_defaults(RunConfig, stored)))))


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, list[Any]]:
    """Key -> [value before, value now] of what differs; a section that one of them lacks counts as one value.

    Two names of the same place on this machine, such as an absolute and a relative one, are equal.
    """
    found: dict[str, list[Any]] = {}
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= differences(old, new, f"{prefix}{key}.")
        elif old != new and not (key.endswith(_PLACES) and _is_one_place(old, new)):
            found[f"{prefix}{key}"] = [old, new]
    return found


def _is_one_place(old: Any, new: Any) -> bool:
    return isinstance(old, str) and isinstance(new, str) and os.path.realpath(old) == os.path.realpath(new)


def as_override(value: Any) -> str:
    """`value` as it is typed behind `key=`."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(as_override, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {as_override(item)}' for key, item in value.items())}}}"
    return str(value)


def written(value: Any) -> str:
    """`as_override`, shortened for messages."""
    text = as_override(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _with_defaults(annotation: Any, value: Any) -> Any:
    """`value` of a field of type `annotation`, with the default of every key that the sections in it lack.

    The folder of a run that an earlier version of this program started has none of the keys that came since.
    """
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is list and isinstance(value, list):
        return [_with_defaults(inner[0], item) for item in value]
    if typing.get_origin(annotation) is dict and isinstance(value, dict):
        return {key: _with_defaults(inner[1], item) for key, item in value.items()}
    # X or X | None.
    for schema in (annotation, *inner):
        if isinstance(schema, type) and dataclasses.is_dataclass(schema) and isinstance(value, dict):
            return _section_with_defaults(schema, value)
    return value


def _section_with_defaults(schema: type, values: dict[str, Any]) -> dict[str, Any]:
    hints, filled = typing.get_type_hints(schema), dict(values)
    for field in dataclasses.fields(schema):
        if field.name not in filled and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
            is_section = dataclasses.is_dataclass(default) and not isinstance(default, type)
            filled[field.name] = dataclasses.asdict(default) if is_section else default
        elif field.name not in filled and field.default is not dataclasses.MISSING:
            filled[field.name] = field.default
        if field.name in filled:
            filled[field.name] = _with_defaults(hints[field.name], filled[field.name])
    return filled

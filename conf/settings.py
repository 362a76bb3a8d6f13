"""Settings of what a name chooses, such as a plugin's kind of layer: from the plain values of a configuration to the
dataclass that belongs to the name. Imports no package."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from typing import Any

from conf.problems import suggestion


def settings_problems(schema: type, values: Any) -> list[tuple[str, str]]:
    """(".key", what is wrong with it) for everything in which `values` are no settings of the dataclass `schema`.

    The key is empty where `values` are no section at all. A field may be such a dataclass again: a section in it.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(values, dict):
        return [("", f"a section with keys is expected, not {values!r}")]
    known = {field.name: field for field in dataclasses.fields(schema)}
    nested = _sections(schema)
    problems = []
    for key, value in values.items():
        if key not in known:
            problems.append((f".{key}", f"no such key{suggestion(str(key), list(known))}"))
        elif key in nested:
            problems += [(f".{key}{below}", text) for below, text in settings_problems(nested[key], value)]
        else:
            try:
                OmegaConf.merge(OmegaConf.structured(schema), {key: value})
            except OmegaConfBaseException as error:
                problems.append((f".{key}", str(error).strip().splitlines()[0]))
    for name, field in known.items():
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_required and name not in values:
            problems.append((f".{name}", "a value is required"))
    return problems


def build_settings(schema: type, values: dict[str, Any]) -> Any:
    """The instance of the dataclass `schema` with `values`, in which `settings_problems` finds nothing."""
    return _built(schema, json.dumps(values))


# Each parameter of a model asks for the settings of its layer, and building them takes milliseconds.
@functools.lru_cache(maxsize=256)
def _built(schema: type, stored: str) -> Any:
    """As `build_settings`, of values in JSON; instances are frozen, so that all may share them."""
    from omegaconf import OmegaConf

    values = json.loads(stored)
    nested = _sections(schema)
    plain = {key: value for key, value in values.items() if key not in nested}
    settings: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
    sections = {}
    for key, section in nested.items():
        if key in values:
            # What is not given is as the field's own default has it.
            default = getattr(settings, key)
            given = build_settings(section, values[key])
            sections[key] = dataclasses.replace(default, **{name: getattr(given, name) for name in values[key]})
    return dataclasses.replace(settings, **sections)


def _sections(schema: type) -> dict[str, type]:
    """The fields of a dataclass that are dataclasses themselves."""
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema) if _is_section(hints[field.name])}


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)

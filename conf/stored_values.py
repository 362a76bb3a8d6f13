"""What a JSON file of ours says, compared with the dataclass that it is to become. Imports no package.

Who reads a file is not who wrote it: a disk, an editor or another program may have put a text where a number was.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any


def misfits(schema: type[Any], values: object, prefix: str = "") -> list[str]:
    """Why `schema(**values)` would not be what its fields' types say, one line each; [] where it would.

    `prefix`: of the names of keys in the lines, with a dot at its end.
    """
    if not isinstance(values, Mapping):
        return [f"{prefix.rstrip('.') or 'it'} is no JSON object"]
    hints, fields = typing.get_type_hints(schema), {field.name: field for field in dataclasses.fields(schema)}
    problems = [f"unknown key {prefix}{key}" for key in values if key not in fields]
    for name, field in fields.items():
        if name in values:
            if not fits(values[name], hints[name]):
                problems.append(f"{prefix}{name} cannot be {shortened(values[name])}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            problems.append(f"key {prefix}{name} is missing")
    return problems


def fits(value: object, annotation: Any) -> bool:
    """Whether a JSON value is of a type: of a field, or of what a list or an object holds."""
    inner = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if annotation is Any:
        return True
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, inner[1]) for item in value.values())
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, kind) for kind in inner)
    if dataclasses.is_dataclass(annotation):
        return not misfits(typing.cast(type, annotation), value)
    if annotation is float:
        return type(value) in (int, float)
    return type(value) is annotation


def shortened(value: object) -> str:
    """`value` for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

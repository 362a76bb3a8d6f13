"""A model's configuration as runs and checkpoints have stored it: the names that earlier versions gave to its keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from model import layers
from model.config import ModelConfig

# Section -> old key -> what it is called now.
_RENAMED = {
    # Up to 0.2.0; it never was the chunk of the kernels.
    "mlstm": {"chunk_size": "reference_chunk_size"},
    "preup_mlstm": {"chunk_size": "reference_chunk_size"},
}


def with_current_keys(stored: Mapping[str, Any]) -> dict[str, Any]:
    """`stored`, the section `model` of a config.yaml or model.json of any version, with the keys of this one."""
    current = dict(stored)
    for section, renamed in _RENAMED.items():
        values = current.get(section)
        if isinstance(values, Mapping):
            current[section] = {renamed.get(key, key): value for key, value in values.items()}
    return current


def what_is_computed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """`stored` without what only chooses how fast the same is computed, and with the defaults of what it lacks.

    Two runs compute the same function of their weights where this is equal.
    """
    current = with_current_keys(stored)
    for field in dataclasses.fields(ModelConfig):
        if field.name not in current and field.default_factory is not dataclasses.MISSING:
            current[field.name] = field.default_factory()
        elif field.name not in current:
            current[field.name] = field.default
    # Where a kind is found, not what it is.
    del current["plugins"]
    speed = {kind.name: kind.speed_settings for kind in layers.registered_kinds()}

    def without_speed(name: str, section: Any) -> Any:
        if not isinstance(section, Mapping):
            return section
        return {key: value for key, value in section.items() if key not in speed.get(name, ())}

    for kind in layers.built_in_kinds():
        current[kind.name] = without_speed(kind.name, current[kind.name])
    current["layers"] = {name: without_speed(name, section) for name, section in current["layers"].items()}
    return current

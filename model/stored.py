"""A model's configuration as runs and checkpoints have stored it: the names that earlier versions gave to its keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
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


def what_is_computed(stored: Mapping[str, Any], first_values: bool = True) -> dict[str, Any]:
    """`stored` without what only chooses how fast the same is computed, and with the defaults of what it lacks.

    Two runs compute the same function of their weights where this is equal. `first_values`: False leaves out, too, what
    only chooses the weights' first values, which mean nothing where there are weights already.
    """
    current = {**_defaults(ModelConfig), **with_current_keys(stored)}
    # Where a kind is found, not what it is.
    del current["plugins"]
    left_out = {
        kind.name: (*kind.speed_settings, *(() if first_values else kind.first_value_settings))
        for kind in layers.registered_kinds()
    }

    def without(name: str, section: Any, prefix: str = "") -> Any:
        if not isinstance(section, Mapping):
            return section
        return {
            key: without(name, value, f"{prefix}{key}.")
            for key, value in section.items()
            if f"{prefix}{key}" not in left_out.get(name, ())
        }

    for kind in layers.built_in_kinds():
        section = current[kind.name]
        if isinstance(section, Mapping):
            section = {**_defaults(kind.settings_class), **section}
        current[kind.name] = without(kind.name, section)
    defaults = {kind.name: dataclasses.asdict(kind.settings_class()) for kind in layers.further_kinds()}
    current["layers"] = {
        name: without(name, _filled(section, defaults.get(name, {}))) for name, section in current["layers"].items()
    }
    return current


def _defaults(schema: type) -> dict[str, Any]:
    """What the fields of a dataclass, all of which have defaults, are where nothing is said of them."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(schema)
    }


def _filled(section: Any, defaults: Mapping[str, Any]) -> Any:
    """`section` with the values, and those in its sections, that it leaves out."""
    if not isinstance(section, Mapping):
        return section
    given = {key: _filled(value, defaults[key]) if key in defaults else value for key, value in section.items()}
    return {**defaults, **given}


def differences(wanted: ModelConfig, found: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Key path -> (value in `wanted`, value in `found`) of what keeps weights of `found` from serving `wanted`.

    A section that only one of the two has is one entry.
    """
    first, second = (what_is_computed(dataclasses.asdict(config), first_values=False) for config in (wanted, found))
    return dict(_differing(first, second))


def _differing(wanted: Mapping[str, Any], found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in {**wanted, **found}:
        one, other = wanted.get(key), found.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differing(one, other, f"{prefix}{key}.")
        elif one != other:
            yield f"{prefix}{key}", (one, other)

"""Settings by their keys, `{"model.d_model": 64}`: put into a configuration, or written as they are typed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from train.stored_configuration import as_override

Tree = TypeVar("Tree")


def replaced(tree: Tree, settings: Mapping[str, Any]) -> Tree:
    """`tree`, a dataclass or mapping with others in it, with these values in it."""
    groups: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        first, dot, rest = key.partition(".")
        if dot:
            groups.setdefault(first, {})[rest] = value
        else:
            found[first] = value
    is_mapping = isinstance(tree, Mapping)
    for name, below in groups.items():
        section = tree[name] if is_mapping else getattr(tree, name)  # type: ignore[index]
        found[name] = replaced(section, below)
    if is_mapping:
        return {**tree, **found}  # type: ignore[return-value,dict-item]
    return dataclasses.replace(tree, **found)  # type: ignore[type-var]


def typed(settings: Mapping[str, Any]) -> list[str]:
    """The settings as a command line has them."""
    return [f"{key}={as_override(value)}" for key, value in settings.items()]

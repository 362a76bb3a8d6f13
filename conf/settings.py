"""Settings of what a name chooses, such as a plugin's kind of layer: from the plain values of a configuration to the
dataclass that belongs to the name. Imports no package."""

from __future__ import annotations

import dataclasses
from typing import Any

from conf.problems import suggestion


def settings_problems(schema: type, values: Any) -> list[tuple[str, str]]:
    """(".key", what is wrong with it) for everything in which `values` are no settings of the dataclass `schema`.

    The key is empty where `values` are no section at all.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(values, dict):
        return [("", f"a section with keys is expected, not {values!r}")]
    known = {field.name: field for field in dataclasses.fields(schema)}
    problems = []
    for key, value in values.items():
        if key not in known:
            problems.append((f".{key}", f"no such key{suggestion(str(key), list(known))}"))
            continue
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
    from omegaconf import OmegaConf

    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))

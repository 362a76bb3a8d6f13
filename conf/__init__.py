"""Values of every configuration group, and the one function that turns them into dataclasses.

The YAML files here hold values only; each schema is a dataclass that lives with the code that uses it. `compose` is the
single way from YAML and command-line overrides to those dataclasses, used by every command line of the project.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF_DIR = Path(__file__).resolve().parent
Schema = TypeVar("Schema")


class ConfigError(ValueError):
    """A configuration that the user must change; `problems` holds one line for each, with its key path."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        count = len(self.problems)
        heading = "1 problem" if count == 1 else f"{count} problems"
        super().__init__(f"{heading} in the configuration:\n" + "\n".join(f"  - {line}" for line in self.problems))


def compose(schema: type[Schema], config_name: str, overrides: Sequence[str] = ()) -> Schema:
    """Compose `conf/<config_name>.yaml` with Hydra `overrides` into an instance of the dataclass `schema`.

    Raises ConfigError with every problem found: overrides that name no key, unknown keys (with the nearest known one),
    values of a wrong type, values still missing (`???`), broken interpolations.
    """
    tree = _compose_tree(config_name, list(overrides))
    return to_dataclass(schema, tree)


def to_dataclass(schema: type[Schema], tree: DictConfig | dict[str, Any]) -> Schema:
    """Check `tree` against `schema` and build the instance. Raises ConfigError with every problem found."""
    tree = OmegaConf.create(tree)
    problems: list[str] = []
    try:
        OmegaConf.resolve(tree)
    except OmegaConfBaseException as error:
        raise ConfigError([_first_line(error)]) from None
    _check_keys(schema, tree, "", problems)
    problems += [f"{key}: a value is required (it is '???')" for key in sorted(OmegaConf.missing_keys(tree))]
    if not problems:
        _check_types(schema, tree, "", problems)
    if problems:
        raise ConfigError(problems)
    merged = OmegaConf.merge(OmegaConf.structured(schema), tree)
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError([f"{key}: a value is required" for key in missing])
    return OmegaConf.to_object(merged)


def _compose_tree(config_name: str, overrides: list[str]) -> DictConfig:
    with initialize_config_dir(version_base=None, config_dir=str(CONF_DIR)):
        try:
            return hydra_compose(config_name, overrides=overrides)
        except (HydraException, OmegaConfBaseException) as error:
            problems = [p for p in (_override_problem(config_name, overrides, o) for o in overrides) if p]
            raise ConfigError(problems or [_first_line(error)]) from None


def _override_problem(config_name: str, overrides: list[str], override: str) -> str | None:
    """Why `override` fails beside the group choices among `overrides`; None when it is not at fault."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        return f"'{override}': {_first_line(error)}"
    groups = [o for o in overrides if o != override and (CONF_DIR / o.split("=")[0].lstrip("+~")).is_dir()]
    try:
        tree = hydra_compose(config_name, overrides=groups)
        hydra_compose(config_name, overrides=[*groups, override])
        return None
    except (HydraException, OmegaConfBaseException) as error:
        key = parsed.key_or_group
        if (CONF_DIR / key).is_dir():
            choices = sorted(path.stem for path in (CONF_DIR / key).glob("*.yaml"))
            return f"{override}: conf/{key}/ has no such file; choose one of {', '.join(choices)}"
        if "Key" not in str(error) and "Could not override" not in str(error):
            return f"'{override}': {_first_line(error)}"
    try:
        return f"{key}: no such key{_suggestion(key, _leaf_keys(tree))}"
    except UnboundLocalError:
        return None


def _leaf_keys(tree: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in tree:
        path = f"{prefix}{key}"
        keys.append(path)
        node = tree._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            keys += _leaf_keys(node, f"{path}.")
    return keys


def _suggestion(key: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""


def _field_types(schema: type) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {f.name: hints[f.name] for f in dataclasses.fields(schema)}


def _dataclass_in(annotation: Any) -> type | None:
    """The dataclass that a field of type X, X | None, list[X] or dict[str, X] holds; None when it holds none."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _children(schema: type, tree: DictConfig, prefix: str):
    """(dataclass, subtree, path) of every nested section of `tree`."""
    for name, annotation in _field_types(schema).items():
        nested = _dataclass_in(annotation)
        if nested is None or name not in tree:
            continue
        node = tree._get_node(name)
        if node._is_none() or node._is_missing():
            continue
        origin = typing.get_origin(annotation)
        if origin is dict:
            yield from ((nested, node[key], f"{prefix}{name}.{key}.") for key in node)
        elif origin is list:
            yield from ((nested, item, f"{prefix}{name}[{index}].") for index, item in enumerate(node))
        elif isinstance(node, DictConfig):
            yield nested, node, f"{prefix}{name}."


def _check_keys(schema: type, tree: DictConfig, prefix: str, problems: list[str]) -> None:
    known = list(_field_types(schema))
    for key in tree:
        if key not in known:
            problems.append(f"{prefix}{key}: no such key{_suggestion(str(key), known)}")
    for nested, node, path in _children(schema, tree, prefix):
        if isinstance(node, DictConfig):
            _check_keys(nested, node, path, problems)
        else:
            problems.append(f"{path.rstrip('.')}: a section with keys is expected, not {node!r}")


def _check_types(schema: type, tree: DictConfig, prefix: str, problems: list[str]) -> None:
    sections = list(_children(schema, tree, prefix))
    nested_names = {name for name, annotation in _field_types(schema).items() if _dataclass_in(annotation)}
    for key in tree:
        if key in nested_names and OmegaConf.is_config(tree[key]):
            continue
        try:
            OmegaConf.merge(OmegaConf.structured(schema), {key: tree[key]})
        except OmegaConfBaseException as error:
            problems.append(f"{prefix}{key}: {_first_line(error)}")
    for nested, node, path in sections:
        _check_types(nested, node, path, problems)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]

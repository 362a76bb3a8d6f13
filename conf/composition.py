"""From YAML and command-line overrides to the dataclasses of a command, with every mistake found at once."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.problems import ConfigError, suggestion, undecodable

CONF_DIR = Path(__file__).resolve().parent
Schema = TypeVar("Schema")


def compose(schema: type[Schema], config_name: str, overrides: Sequence[str] = ()) -> Schema:
    """Compose `conf/<config_name>.yaml` with Hydra `overrides` into an instance of the dataclass `schema`.

    Raises ConfigError with every problem found: overrides that name no key, unknown keys (with the nearest known one),
    values of a wrong type, values still missing (`???`), broken interpolations.
    """
    if problems := undecodable(overrides):
        raise ConfigError(problems)
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
    built = _build(schema, tree, "", problems)
    if built is None or problems:
        raise ConfigError(problems)
    return built


def _compose_tree(config_name: str, overrides: list[str]) -> DictConfig:
    with initialize_config_dir(version_base=None, config_dir=str(CONF_DIR)):
        try:
            return hydra_compose(config_name, overrides=overrides)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_override_problems(config_name, overrides) or [_first_line(error)]) from None


def _override_problems(config_name: str, overrides: list[str]) -> list[str]:
    """What is wrong with each of `overrides`: Hydra itself stops at the first."""
    problems, groups, values = [], [], []
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException as error:
            problems.append(f"'{override}': {_first_line(error)}{_how_to_quote(override)}")
            continue
        group = CONF_DIR / parsed.key_or_group
        if not group.is_dir():
            values.append((parsed.key_or_group, override))
        elif isinstance(parsed.value(), str) and not (group / f"{parsed.value()}.yaml").is_file():
            choices = sorted(path.stem for path in group.glob("*.yaml"))
            problems.append(
                f"{override}: conf/{parsed.key_or_group}/ has no such file; choose one of {', '.join(choices)}"
            )
        else:
            groups.append(override)
    try:
        known = _leaf_keys(hydra_compose(config_name, overrides=groups))
    except (HydraException, OmegaConfBaseException) as error:
        return [*problems, _first_line(error)]
    for key, override in values:
        try:
            hydra_compose(config_name, overrides=[*groups, override])
        except (HydraException, OmegaConfBaseException) as error:
            reason = f"no such key{suggestion(key, known)}"
            if key in known:
                reason = _first_line(error) + (_how_to_quote(override) if "Ambiguous" in str(error) else "")
            problems.append(f"{key}: {reason}")
    return problems


def _how_to_quote(override: str) -> str:
    """How to type a value, such as a path, whose characters mean something else to Hydra; empty for other values."""
    key, _, value = override.partition("=")
    if value[:1] in ("", "{", "[", "(") or "'" in value or '"' in value:
        return ""
    return f"; if the value is one text, quote it: '{key}=\"{value}\"'"


def _leaf_keys(tree: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in tree:
        path = f"{prefix}{str(key)}"
        keys.append(path)
        node = tree._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            keys += _leaf_keys(node, f"{path}.")
    return keys


def _field_types(schema: type) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {f.name: hints[f.name] for f in dataclasses.fields(schema)}


def _dataclass_in(annotation: Any) -> type | None:
    """The dataclass that a field of type X, X | None, list[X] or dict[str, X] holds; None when it holds none."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _children(schema: type, tree: DictConfig, prefix: str) -> Iterator[tuple[str, Any, type, DictConfig, str]]:
    """(field name, key or index or None, dataclass, subtree, path) of every nested section of `tree`."""
    for name, annotation in _field_types(schema).items():
        nested = _dataclass_in(annotation)
        if nested is None or name not in tree:
            continue
        node = tree._get_node(name)
        assert isinstance(node, Node)  # `name` is in the tree.
        if node._is_none() or node._is_missing():
            continue
        if isinstance(node, ListConfig):
            yield from ((name, index, nested, item, f"{prefix}{name}[{index}].") for index, item in enumerate(node))
        elif isinstance(node, DictConfig) and dict in (annotation, typing.get_origin(annotation)):
            yield from ((name, key, nested, node[key], f"{prefix}{name}.{str(key)}.") for key in node)
        else:
            yield name, None, nested, tree[name], f"{prefix}{name}."


def _check_keys(schema: type, tree: DictConfig, prefix: str, problems: list[str]) -> None:
    known = list(_field_types(schema))
    for key in tree:
        if key not in known:
            problems.append(f"{prefix}{str(key)}: no such key{suggestion(str(key), known)}")
    for _, _, nested, node, path in _children(schema, tree, prefix):
        if isinstance(node, DictConfig):
            _check_keys(nested, node, path, problems)
        else:
            problems.append(f"{path.rstrip('.')}: a section with keys is expected, not {node!r}")


def _build(schema: type[Schema], tree: DictConfig, prefix: str, problems: list[str]) -> Schema | None:
    """The instance of `schema` with the values of `tree`; None after adding to `problems`."""
    if not isinstance(tree, DictConfig):
        return None
    values: dict[str, Any] = {}
    for name, key, nested, node, path in _children(schema, tree, prefix):
        section = _build(nested, node, path, problems)
        if key is None:
            values[name] = section
        elif isinstance(key, int):
            values.setdefault(name, []).append(section)
        else:
            values.setdefault(name, {})[key] = section
    for key in tree:
        if key in values or key not in _field_types(schema) or OmegaConf.is_missing(tree, key):
            continue
        try:
            merged = OmegaConf.merge(OmegaConf.structured(schema), {key: tree[key]})
            assert isinstance(merged, DictConfig)
            values[key] = (
                OmegaConf.to_container(merged._get_node(key)) if OmegaConf.is_config(tree[key]) else merged[key]
            )
        except OmegaConfBaseException as error:
            problems.append(f"{prefix}{key}: {_first_line(error)}")
    required = [
        f.name
        for f in dataclasses.fields(typing.cast(Any, schema))
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING or f.default == MISSING
    ]
    problems += [f"{prefix}{name}: a value is required" for name in required if name not in tree.keys()]  # noqa: SIM118
    return None if problems else schema(**values)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]

"""From YAML and command-line overrides to the dataclasses of a command, with every mistake found at once."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, ListConfig, Node, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from conf.overrides import (
    Typed,
    conform,
    field_types,
    from_command_line,
    keys_of,
    other_name,
    parse_override,
    type_at,
    with_dashes_and_spaces,
    without_none,
)
from conf.problems import ConfigError, suggestion, undecodable

CONF_DIR = Path(__file__).resolve().parent
Schema = TypeVar("Schema")
# So like a known key that it is a slip of the fingers, whatever other trainers mean by its last part.
_NEARLY_SAME = 0.9
_REQUIRED = "a value is required"
# Groups whose files set values of others.
_IN_MANY_SECTIONS = ("model", "recipe", "experiment")


def compose(
    schema: type[Schema],
    config_name: str,
    overrides: Sequence[str] = (),
    check: Callable[[Schema], list[str]] | None = None,
    base: DictConfig | None = None,
) -> Schema:
    """Compose `conf/<config_name>.yaml` with Hydra `overrides` into an instance of the dataclass `schema`.

    A value is read after the type of its field: a text stays as it was typed, though it looks like a number.

    `check`: finds the problems of an instance. It is asked only where there are problems, about what is left without
    them, so that a message shows all at once.
    `base`: whole values that stand in the place of those of `conf/<config_name>.yaml`; the choice of a group replaces
    its section.
    Raises ConfigError with every problem found: overrides that name no key, unknown keys (with the nearest known one),
    values of a wrong type, values still missing (`???`), broken interpolations.
    """
    if unreadable := undecodable(overrides):
        raise ConfigError(unreadable)
    tree, applied, problems = _compose_tree(schema, config_name, list(overrides), base)
    try:
        built = to_dataclass(schema, tree)
    except ConfigError as error:
        # What is missing because it was mistyped is one mistake.
        meant = re.findall(r"did you mean '([^']+)'", "\n".join(problems))
        problems += [line for line in error.problems if not line.startswith(tuple(f"{k}: {_REQUIRED}" for k in meant))]
    if not problems:
        return built
    if check is not None and (rest := _without_problems(schema, config_name, applied, problems, base)) is not None:
        # What follows from a mistyped key or a missing value would be a second line about one mistake.
        at_fault = [re.escape(line.split(":")[0].rpartition(".")[2]) for line in problems]
        follows = re.compile(rf"\b({'|'.join(at_fault)})")
        found = [line for line in check(rest) if not follows.search(line)]
        if any(re.match(rf"({'|'.join(_IN_MANY_SECTIONS)})=", line) for line in problems):
            # Other values than were meant stand where nothing was typed.
            typed = [override.lstrip("+~").partition("=")[0] for override in applied]
            found = [line for line in found if line.split(":")[0] in typed]
        problems += found
    raise ConfigError(problems)


def _without_problems(
    schema: type[Schema], config_name: str, applied: list[str], problems: list[str], base: DictConfig | None
) -> Schema | None:
    """The instance that the `applied` overrides without `problems` give; None where they give none."""
    bad = [line.split(":")[0].replace("[", ".") for line in problems]
    good = [
        override
        for override in applied
        if not any((key + ".").startswith(override.lstrip("+~").partition("=")[0] + ".") for key in bad)
    ]
    tree, _, _ = _compose_tree(schema, config_name, good, base)
    try:
        for key in OmegaConf.missing_keys(tree):
            OmegaConf.update(tree, key, "NONE_YET")
        return to_dataclass(schema, tree)
    except (ConfigError, OmegaConfBaseException):
        return None


def to_dataclass(schema: type[Schema], tree: DictConfig | dict[str, Any]) -> Schema:
    """Check `tree` against `schema` and build the instance. Raises ConfigError with every problem found."""
    tree = OmegaConf.create(tree)
    problems: list[str] = []
    try:
        _make_interpolated_texts(schema, tree)
        OmegaConf.resolve(tree)
    except OmegaConfBaseException as error:
        raise ConfigError([_first_line(error)]) from None
    _check_keys(schema, tree, "", problems)
    problems += [f"{key}: {_REQUIRED}; set {key}=VALUE" for key in sorted(OmegaConf.missing_keys(tree))]
    built = _build(schema, tree, "", problems)
    if built is None or problems:
        raise ConfigError(problems)
    return built


def _make_interpolated_texts(schema: type, tree: DictConfig) -> None:
    """Make texts of the numbers that texts refer to: `name=${seed}`."""
    for key in _leaf_keys(tree):
        if without_none(type_at(schema, key))[0] is not str:
            continue
        section, _, name = key.rpartition(".")
        parent = OmegaConf.select(tree, section) if section else tree
        if isinstance(parent, DictConfig) and OmegaConf.is_interpolation(parent, name):
            value = parent[name]
            parent[name] = value if value is None else str(value)


def _compose_tree(
    schema: type, config_name: str, overrides: list[str], base: DictConfig | None
) -> tuple[DictConfig, list[str], list[str]]:
    """The tree, those of `overrides` that went into it, and what is wrong with the others: Hydra itself stops at the
    first problem, and reads values without knowing their types."""
    groups = _groups(config_name)
    problems: list[str] = []
    values: list[Override] = []
    choices: list[str] = []
    sections: list[str] = []
    for override, problem in with_dashes_and_spaces(overrides, [*keys_of(schema), *groups]):
        if problem:
            problems.append(problem)
            continue
        try:
            parsed = parse_override(override)
        except HydraException as error:
            problems.append(f"'{override}': {_first_line(error)}{_how_to_quote(override)}")
            continue
        # group@section=choice takes a file of any group into a section.
        elsewhere = parsed.package is not None and (CONF_DIR / parsed.key_or_group).is_dir()
        if parsed.key_or_group not in groups and not elsewhere:
            values.append(parsed)
        elif _is_null(parsed) and groups.get(parsed.key_or_group):
            continue
        elif problem := _no_choice(override, parsed):
            problems.append(problem)
        elif base is not None and not elsewhere and parsed.key_or_group not in field_types(schema):
            problems.append(f"{override}: sets values in many sections, which are given already; set them one by one")
        else:
            choices.append(override)
            sections.append(parsed.package or parsed.key_or_group)
    tree, applied = _compose_choices(config_name, choices, problems)
    if base is not None:
        tree = _on_top_of(base, tree, sections)
    for parsed in values:
        found = _apply(schema, tree, parsed)
        problems += found
        if not found:
            applied.append(str(parsed.input_line))
    return tree, applied, problems


def _groups(config_name: str) -> dict[str, bool]:
    """The groups that `conf/<config_name>.yaml` chooses from, and whether a group may be left out (null)."""
    defaults = yaml.safe_load((CONF_DIR / f"{config_name}.yaml").read_text())["defaults"]
    entries = [entry for entry in defaults if isinstance(entry, dict)]
    return {group.removeprefix("optional "): choice is None for entry in entries for group, choice in entry.items()}


def _is_null(override: Override) -> bool:
    value = override.value()
    return isinstance(value, Typed) and value.value is None


def _no_choice(override: str, parsed: Override) -> str:
    """What is wrong with the choice of a group; empty for a file of it."""
    group, value = parsed.key_or_group, parsed.value()
    name = value.text if isinstance(value, Typed) else value
    choices = sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
    always_chosen = parsed.type != OverrideType.CHANGE and parsed.package is None
    if name in choices and not always_chosen:
        return ""
    if always_chosen:
        return (
            f"{override}: a group is always chosen, without + and ~: {group}=CHOICE; choose one of {', '.join(choices)}"
        )
    nearly = suggestion(str(name), choices)
    return f"{override}: conf/{group}/ has no such file{nearly}; choose one of {', '.join(choices)}"


def _compose_choices(config_name: str, choices: list[str], problems: list[str]) -> tuple[DictConfig, list[str]]:
    """The tree of these choices, and the choices; without them after adding to `problems` where they do not compose."""
    try:
        return copy.deepcopy(_tree_of_files(CONF_DIR, config_name, tuple(choices))), choices
    except (HydraException, OmegaConfBaseException) as error:
        problems.append(_first_line(error))
        return copy.deepcopy(_tree_of_files(CONF_DIR, config_name, ())), []


@functools.cache
def _tree_of_files(directory: Path, config_name: str, choices: tuple[str, ...]) -> DictConfig:
    """Read once in a process: a sweep composes each of its hundreds of runs from the same files."""
    with initialize_config_dir(version_base=None, config_dir=str(directory)):
        return hydra_compose(config_name, overrides=list(choices))


def _on_top_of(base: DictConfig, chosen: DictConfig, sections: list[str]) -> DictConfig:
    """`base` with the `sections` of `chosen`."""
    tree = OmegaConf.create(OmegaConf.to_container(base))
    assert isinstance(tree, DictConfig)
    for section in sections:
        # The old values go: a section of another choice may have other keys.
        OmegaConf.update(tree, section, OmegaConf.to_container(OmegaConf.select(chosen, section)), merge=False)
    OmegaConf.set_struct(tree, True)
    return tree


def _apply(schema: type, tree: DictConfig, override: Override) -> list[str]:
    """Apply one override to `tree`, as Hydra does; returns what is wrong with it, and then `tree` is as it was."""
    key, line = override.key_or_group, str(override.input_line)
    known = _leaf_keys(tree)
    adds = override.is_add() or override.is_force_add()
    # Items of a list have numbers for keys, and are left to OmegaConf.
    if not adds and key not in known and not re.search(r"\[|\.\d", key):
        adds = not override.is_delete() and _is_field_of_a_section(schema, tree, key)
        if not adds:
            return [_no_such_key(schema, key, line, known)]
    if override.package is not None:
        return [f"{line}: conf/{key}/ is no group of choices"]
    if override.is_sweep_override():
        return [f"{key}: one value is wanted, not several ({line}){_how_to_quote(line)}"]
    if override.is_delete():
        section, _, name = key.rpartition(".")
        with open_dict(tree):
            del (OmegaConf.select(tree, section) if section else tree)[name]
        return []
    problems: list[str] = []
    value = from_command_line(override._value, type_at(schema, key), key, problems)
    if override.is_add() and not isinstance(value, (dict, list)) and OmegaConf.select(tree, key) is not None:
        problems.append(f"{key}: is there already; leave out the + ({line})")
    if problems:
        return problems
    try:
        OmegaConf.update(tree, key, value, merge=True, force_add=adds)
    except (ConfigAttributeError, ConfigKeyError):
        return [_no_such_key(schema, key, line, known)]
    except OmegaConfBaseException as error:
        return [f"{key}: {_first_line(error)}"]
    return []


def _is_field_of_a_section(schema: type, tree: DictConfig, key: str) -> bool:
    """Whether a section of `tree` leaves `key` at its default, so that setting it adds it to the tree."""
    section, _, name = key.rpartition(".")
    kind, _ = without_none(type_at(schema, section)) if section else (schema, False)
    there = not section or isinstance(OmegaConf.select(tree, section), DictConfig)
    return there and isinstance(kind, type) and dataclasses.is_dataclass(kind) and name in field_types(kind)


def _no_such_key(schema: type, key: str, line: str, known: list[str]) -> str:
    if type_at(schema, key) is not Any:
        return f"{key}: no such key yet{suggestion(key, known, _NEARLY_SAME)}; a plus adds it: +{line.lstrip('~')}"
    if nearly := suggestion(key, known, _NEARLY_SAME):
        return f"{key}: no such key{nearly}"
    other = other_name(key, known)
    return f"{key}: no such key{f' (did you mean {other!r}?)' if other else suggestion(key, known)}"


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


def _dataclass_in(annotation: Any) -> type | None:
    """The dataclass that a field of type X, X | None, list[X] or dict[str, X] holds; None when it holds none."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _children(schema: type, tree: DictConfig, prefix: str) -> Iterator[tuple[str, Any, type, DictConfig, str]]:
    """(field name, key or index or None, dataclass, subtree, path) of every nested section of `tree`."""
    for name, annotation in field_types(schema).items():
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
    known = list(field_types(schema))
    for key in tree:
        if key not in known:
            problems.append(f"{prefix}{str(key)}: no such key{suggestion(str(key), known)}")
    for _, _, nested, node, path in _children(schema, tree, prefix):
        if isinstance(node, DictConfig):
            _check_keys(nested, node, path, problems)
            continue
        given, first = "null" if node is None else repr(node), _first_key(nested)
        problems.append(
            f"{path.rstrip('.')}: a section with keys is expected, not {given}; set a key of it, such as "
            f"{path}{first}=VALUE"
        )


def _first_key(schema: type) -> str:
    """A key of a section, for an example: the first that has no default, else the first."""
    fields = dataclasses.fields(schema)
    return next((f.name for f in fields if f.default == MISSING), fields[0].name)


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
    plain: dict[str, Any] = {}
    types = field_types(typing.cast(type, schema))
    for key in tree:
        if key in values or key not in types or OmegaConf.is_missing(tree, key):
            continue
        given = OmegaConf.to_container(tree[key]) if OmegaConf.is_config(tree[key]) else tree[key]
        found: list[str] = []
        plain[key] = conform(given, types[key], f"{prefix}{key}", found)
        problems += found
        if found:
            del plain[key]
    values |= _converted(schema, plain, prefix, problems)
    required = [
        f.name
        for f in dataclasses.fields(typing.cast(Any, schema))
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING or f.default == MISSING
    ]
    missing = [f"{prefix}{name}" for name in required if name not in tree.keys()]  # noqa: SIM118
    problems += [f"{key}: {_REQUIRED}; set {key}=VALUE" for key in missing]
    return None if problems else schema(**values)


def _converted(schema: type, plain: dict[str, Any], prefix: str, problems: list[str]) -> dict[str, Any]:
    """The values as the fields' types have them; adds to `problems` for each that OmegaConf refuses."""
    try:
        merged = OmegaConf.merge(_defaults(schema), plain)
    except OmegaConfBaseException as error:
        if len(plain) == 1:
            problems.append(f"{prefix}{next(iter(plain))}: {_first_line(error)}")
            return {}
        # It stops at the first one.
        one_by_one = (_converted(schema, {key: value}, prefix, problems) for key, value in plain.items())
        return {key: value for found in one_by_one for key, value in found.items()}
    assert isinstance(merged, DictConfig)
    return {
        key: OmegaConf.to_container(merged._get_node(key)) if isinstance(value, (dict, list)) else merged[key]
        for key, value in plain.items()
    }


@functools.cache
def _defaults(schema: type) -> DictConfig:
    """Not to be changed."""
    return OmegaConf.structured(schema)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]

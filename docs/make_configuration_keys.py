"""Write docs/configuration_keys.md: every key of a run's and of a preparation's configuration, from the dataclasses.

`make docs` runs it. What a key means is the comment above its field, what a section means its docstring, the default is
what the YAML files give, and the choices are those that validation names when it is given a wrong one.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conf import CONF_DIR, compose
from data_pipeline.preparing.config import PrepareConfig, validate_prepare
from launch.calibrate import CalibrateConfig, validate_calibration
from launch.job import SubmitConfig, validate_machines
from launch.planner.command import PlanConfig
from launch.planner.command import validate_machines as validate_planned_machines
from launch.sweep.config import SweepPlanConfig, validate_sweep
from model.layers import further_kinds
from train.config import RunConfig
from train.validate import validate

PAGE = Path(__file__).with_name("configuration_keys.md")
_WORDS = {
    type(None): "null",
    bool: "true or false",
    str: "text",
    int: "whole number",
    float: "number",
    Any: "anything",
}
HEAD = """\
# Every configuration key

`make docs` writes this page from the comments in the code; a test holds it current. Do not edit it by hand.
[configuration.md](configuration.md) explains how values are set: `group=choice` takes a file, `section.key=value` a
value. `required` means that you must give one. Below `NAME` you choose the names yourself. Another model has another
[recipe](configuration.md#recipes): other defaults of `model`, `optimizer`, `schedule` and of some keys of `training`.
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """One dataclass of a configuration, at the place where its keys stand."""

    path: str
    schema: type
    # What the YAML files give; None where they leave the section out.
    values: Any


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


def page() -> str:
    """The whole page. Raises ValueError that names every field without a comment and section without a docstring."""
    run = compose(RunConfig, "train", ["name=NAME", "corpus.directory=DIR", "training.total_steps=1000"])
    preparation = compose(PrepareConfig, "prepare", ["output=DIR"])
    submission = compose(SubmitConfig, "submit")
    sweep = compose(SweepPlanConfig, "sweep")
    planning, calibration = compose(PlanConfig, "plan"), compose(CalibrateConfig, "calibrate")
    required = {"name", "corpus.directory", "output"}
    # A run's length has no default either, but either of two keys gives it.
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, total_steps=None))
    of_preparation = {section.schema for section in sections(preparation)} - {PrepareConfig}
    in_trees = [
        section for tree in (run, preparation, submission, sweep, planning, calibration) for section in sections(tree)
    ]
    missing = [
        problem
        for schema in {section.schema: None for section in (*in_trees, *_further_kinds())}
        for problem in undocumented(schema)
    ]
    if missing:
        raise ValueError("\n".join(["the configuration keys need an explanation in the code:", *missing]))
    # Recipes set keys of several sections and have none of their own.
    lines = [HEAD, f"## A run: `python -m train`{_choices_of_group('recipe')}\n"]
    shared = tuple(section.path for section in sections(run) if section.schema in of_preparation)
    for section in sections(run):
        if section.path in shared and not _is_below(section.path, shared):
            lines += _heading(section), f"The keys of [`{_name_in(preparation, section)}`](#a-preparation).\n"
        elif not _is_below(section.path, shared):
            lines += _render(section, required, lambda key: _choices_of_run(run, key))
        if section.path == "model.attention.":
            for further in _further_kinds():
                lines += _render(further, set(), lambda key: [])
    lines.append("## A preparation\n")
    for section in sections(preparation):
        lines += _render(section, required, lambda key: _choices_of_preparation(preparation, key))
    lines.append("## A submission: `python -m launch submit`\n")
    for section in sections(submission):
        lines += _render(section, required, lambda key: _choices(submission, key, validate_machines))
    lines.append("## A sweep: `python -m launch sweep plan`\n")
    for section in sections(sweep):
        # The machines of its runs are those of a submission.
        if section.path.startswith("sweep."):
            lines += _render(section, required, lambda key: _choices(sweep, key, validate_sweep))
    lines.append("## A plan: `python -m launch plan`\n")
    for section in sections(planning):
        lines += _render(section, set(), lambda key: _choices(planning, key, validate_planned_machines))
    lines.append("## A calibration: `python -m launch calibrate`\n")
    for section in sections(calibration):
        lines += _render(section, set(), lambda key: _choices(calibration, key, validate_calibration))
    return "\n".join(lines)


def sections(tree: Any) -> list[Section]:
    """Every section of a configuration, in the order of its fields."""
    return list(_walk(type(tree), "", tree))


def _further_kinds() -> list[Section]:
    """The settings of the kinds of layers that have no section of ModelConfig, at their places."""
    found = [(f"model.layers.{kind.name}.", kind.settings_class) for kind in further_kinds()]
    return [section for path, schema in found for section in _walk(schema, path, schema())]


def _walk(schema: type, path: str, values: Any) -> Iterator[Section]:
    yield Section(path, schema, values)
    for name, annotation in field_types(schema).items():
        nested = section_type(annotation)
        if nested is None:
            continue
        value = getattr(values, name, None) if values is not None else None
        origin = typing.get_origin(annotation)
        if origin is dict:
            yield from _walk(nested, f"{path}{name}.NAME.", None)
        elif origin is list:
            yield from _walk(nested, f"{path}{name}[I].", None)
        else:
            yield from _walk(nested, f"{path}{name}.", value)


def section_type(annotation: Any) -> type | None:
    """The dataclass in X, X | None, list[X] or dict[str, X]; None where there is none."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def undocumented(schema: type) -> list[str]:
    """What lacks a comment or docstring in `schema`, one line each."""
    where = f"{schema.__module__}.{schema.__qualname__}"
    explained = comments(schema)
    problems = [
        f"  {where}.{name}: no comment above the field"
        for name, annotation in field_types(schema).items()
        if name not in explained and section_type(annotation) is None
    ]
    if not docstring(schema):
        problems.append(f"  {where}: no docstring")
    return problems


def docstring(schema: type) -> str:
    """The class' own docstring, not the signature that `dataclass` puts in its place."""
    (body,) = ast.parse(_source(schema)).body
    assert isinstance(body, ast.ClassDef)
    return " ".join((ast.get_docstring(body) or "").split())


def comments(schema: type) -> dict[str, str]:
    """Field -> the comment lines directly above it, as one text; fields without one are left out."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        source = _source(base)
        lines = source.splitlines()
        (body,) = ast.parse(source).body
        assert isinstance(body, ast.ClassDef)
        for node in body.body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            first = node.lineno - 1
            start = first
            while lines[start - 1].strip().startswith("#"):
                start -= 1
            if text := " ".join(line.strip().lstrip("#").strip() for line in lines[start:first]):
                found[node.target.id] = text
    return found


def _source(schema: type) -> str:
    return textwrap.dedent(inspect.getsource(schema))


def field_types(schema: type) -> dict[str, Any]:
    """Field -> its type, with names resolved."""
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def _is_below(path: str, others: tuple[str, ...]) -> bool:
    return any(path != other and path.startswith(other) for other in others)


def _name_in(preparation: PrepareConfig, section: Section) -> str:
    (path,) = [other.path for other in sections(preparation) if other.schema is section.schema]
    return path.rstrip(".")


def _heading(section: Section) -> str:
    return f"### `{section.path.rstrip('.')}`\n"


def _render(section: Section, required: set[str], choices: Callable[[str], list[str]]) -> list[str]:
    explained = comments(section.schema)
    rows = []
    for name, annotation in field_types(section.schema).items():
        if section_type(annotation) is not None:
            continue
        key = f"{section.path}{name}"
        default = "required" if key in required else f"`{_value(section, name)}`"
        meaning = _sentence(explained[name])
        offered = [choice for choice in choices(key) if not re.search(rf"\b{re.escape(choice)}\b", meaning)]
        if offered:
            meaning += f" One of {', '.join(f'`{choice}`' for choice in choices(key))}."
        rows.append(f"| `{key}` | {_type_in_words(annotation)} | {default} | {_escaped(meaning)} |")
    lines = [_heading(section)] if section.path else []
    lines.append(f"{docstring(section.schema)}{_files(section)}\n")
    if rows:
        lines += ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    return lines


def _files(section: Section) -> str:
    """The choices of a configuration group, after a blank line."""
    return _choices_of_group(section.path.rstrip(".")) if section.path else ""


def _choices_of_group(group: str) -> str:
    names = sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
    return f"\n\nChoices of `{group}=`: {', '.join(f'`{name}`' for name in names)}." if names else ""


def _value(section: Section, name: str) -> str:
    if section.values is not None:
        value = getattr(section.values, name)
    else:
        (field,) = [field for field in dataclasses.fields(section.schema) if field.name == name]
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            value = field.default
        else:
            return "required"
    return json.dumps(value)


def _escaped(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


def _sentence(comment: str) -> str:
    return comment if comment.endswith((".", ")", "?")) else f"{comment}."


def _type_in_words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_in_words(argument) for argument in arguments)
    if origin is list:
        return f"list of {_type_in_words(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type_in_words(arguments[0])} to {_type_in_words(arguments[1])}"
    return _WORDS[annotation]


def _choices_of_run(run: RunConfig, key: str) -> list[str]:
    return _choices(run, key, lambda config: validate(config, 1))


def _choices_of_preparation(preparation: PrepareConfig, key: str) -> list[str]:
    return _choices(preparation, key, validate_prepare)


def _choices(tree: Any, key: str, problems: Callable[[Any], list[str]]) -> list[str]:
    """What validation offers instead of a wrong value of a text; empty for other keys and where anything goes."""
    parts = key.split(".")
    holders = [tree]
    for part in parts[:-1]:
        holders.append(getattr(holders[-1], part, None))
        if not dataclasses.is_dataclass(holders[-1]):
            return []
    if not isinstance(getattr(holders[-1], parts[-1]), str):
        return []
    value: Any = "no such choice"
    for holder, part in zip(reversed(holders), reversed(parts), strict=True):
        value = dataclasses.replace(holder, **{part: value})
    for line in problems(value):
        if line.startswith(f"{key}: ") and (found := re.search(r"choose one of (.+)$", line)):
            return found[1].split(", ")
    return []


if __name__ == "__main__":
    main()

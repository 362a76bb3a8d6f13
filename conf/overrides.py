"""Command-line overrides in Hydra's grammar, read with the schema in hand: a text stays as it was typed.

Hydra's own reading makes a number of every text that looks like one: `name=12e4567` would be `inf`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from antlr4 import CommonTokenStream, InputStream
from hydra.core.override_parser.overrides_parser import create_functions
from hydra.core.override_parser.overrides_visitor import HydraErrorListener, HydraOverrideVisitor
from hydra.core.override_parser.types import Override, QuotedString
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser


@dataclass(frozen=True)
class Typed:
    """A number, null, true or false that was typed without quotes: what it says and what Hydra reads."""

    text: str
    value: int | float | bool | None


class _Visitor(HydraOverrideVisitor):
    """Hydra's reading of an override, where a number, null, true or false keeps its text."""

    _functions_around = 0

    def visitFunction(self, ctx: Any) -> Any:  # noqa: N802 (a name of Hydra's)
        self._functions_around += 1
        try:
            return super().visitFunction(ctx)
        finally:
            self._functions_around -= 1

    def _createPrimitive(self, ctx: Any) -> Any:  # noqa: N802
        value = super()._createPrimitive(ctx)
        # Hydra's functions, such as float(3), take plain values.
        if self._functions_around or isinstance(value, (str, QuotedString)):
            return value
        return Typed(ctx.getText().strip(), value)


def parse_override(text: str) -> Override:
    """Parse one override; its `_value` holds `Typed` scalars. Raises HydraException where the grammar has no such."""
    lexer = OverrideLexer(InputStream(text))
    parser = OverrideParser(CommonTokenStream(lexer))
    for recognizer in (lexer, parser):
        recognizer.removeErrorListeners()
        recognizer.addErrorListener(HydraErrorListener())
    override: Override = _Visitor(create_functions()).visit(parser.override())
    override.input_line = text
    override.validate()
    return override


@functools.cache
def field_types(schema: type) -> dict[str, Any]:
    """The type of each field of a dataclass. Not to be changed: all callers get the same."""
    hints = typing.get_type_hints(schema)
    return {f.name: hints[f.name] for f in dataclasses.fields(schema)}


def keys_of(schema: type, prefix: str = "") -> Iterator[str]:
    """The path of every field of a dataclass and of those in it."""
    for name, annotation in field_types(schema).items():
        yield f"{prefix}{name}"
        kind, _ = without_none(annotation)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from keys_of(kind, f"{prefix}{name}.")


def type_at(annotation: Any, key: str) -> Any:
    """The type of the value at the path `key` (`sets.books.split`, `phases[0].weights`) below `annotation`; Any where
    the schema says nothing of it."""
    for part in key.replace("[", ".").replace("]", "").split("."):
        annotation = _type_below(annotation, part)
    return annotation


def _type_below(annotation: Any, part: str) -> Any:
    kind = without_none(annotation)[0]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return field_types(kind).get(part, Any)
    arguments = typing.get_args(kind)
    return arguments[-1] if typing.get_origin(kind) in (list, dict) else Any


def without_none(annotation: Any) -> tuple[Any, bool]:
    """`annotation` without its None, and whether it had one. A union of several types is Any."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation, False
    others = [one for one in typing.get_args(annotation) if one is not type(None)]
    return others[0] if len(others) == 1 else Any, len(others) < len(typing.get_args(annotation))


def from_command_line(value: Any, annotation: Any, key: str, problems: list[str]) -> Any:
    """The value of an override as plain Python, after `annotation`; adds to `problems` what cannot be meant."""
    kind, optional = without_none(annotation)
    if isinstance(value, list):
        below = _type_below(kind, "")
        return [from_command_line(one, below, f"{key}[{index}]", problems) for index, one in enumerate(value)]
    if isinstance(value, dict):
        texts = typing.get_origin(kind) is not dict or typing.get_args(kind)[0] is str
        named = {_key(name, texts): one for name, one in value.items()}
        return {
            name: from_command_line(one, _type_below(kind, str(name)), f"{key}.{name}", problems)
            for name, one in named.items()
        }
    if isinstance(value, QuotedString):
        return value.text
    if kind is str:
        return _text(value, optional, key, problems)
    return whole_number(value, kind) if isinstance(value, Typed) else value


def _key(name: Any, is_text: bool) -> Any:
    if isinstance(name, Typed):
        return name.text if is_text else name.value
    return name


def _text(value: Any, optional: bool, key: str, problems: list[str]) -> Any:
    if isinstance(value, Typed) and value.value is None:
        return None
    text = value.text if isinstance(value, Typed) else value
    if optional and (isinstance(value, Typed) and isinstance(value.value, bool) or is_none(text)):
        problems.append(no_text(key, text))
    return text


def is_none(text: Any) -> bool:
    """Whether `text` is Python's word for null."""
    return isinstance(text, str) and text.lower() == "none"


def no_text(key: str, text: str) -> str:
    """The problem with a word that stands for "not set" or for a switch, where a text or null is wanted."""
    return f"{key}: a text or null is wanted, not {text}; write {key}=null for none, or quote it: '{key}=\"{text}\"'"


def whole_number(value: Any, kind: Any) -> Any:
    """`value`, or the whole number that it is (1e9) where `kind` is int."""
    if isinstance(value, Typed):
        number, text = value.value, value.text.replace("_", "")
    else:
        number, text = value, str(value)
    if kind is int and isinstance(number, float) and number.is_integer():
        return int(Decimal(text))
    return number


def conform(value: Any, annotation: Any, key: str, problems: list[str]) -> Any:
    """The plain `value` of a YAML file or of Python after `annotation`: 1e9 may be a whole number, but nothing that is
    no text becomes one. Adds to `problems`."""
    kind, optional = without_none(annotation)
    if value is None and not optional and kind not in (Any, type(None)):
        problems.append(f"{key}: a value is required, null is none")
        return value
    if isinstance(value, dict):
        for name in value:
            if typing.get_origin(kind) is dict and typing.get_args(kind)[0] is str and not isinstance(name, str):
                problems.append(f"{key}: the name {name!r} is no text; quote it as it is meant")
        return {
            name: conform(one, _type_below(kind, str(name)), f"{key}.{name}", problems) for name, one in value.items()
        }
    if isinstance(value, list):
        below = _type_below(kind, "")
        return [conform(one, below, f"{key}[{index}]", problems) for index, one in enumerate(value)]
    if kind is str and value is not None and not isinstance(value, str):
        problems.append(f"{key}: a text is wanted, not {value!r}; quote it as it is meant")
    if kind is str and isinstance(value, str) and (value == "~" or value.startswith("~/")):
        # A shell leaves it as it is where it is quoted, or follows a key with a dot.
        value = os.path.expanduser(value)
    value = whole_number(value, kind)
    if kind is int and (isinstance(value, float) or isinstance(value, str) and not _is_number(value, int)):
        problems.append(f"{key}: a whole number is wanted, such as 1000, 1_000 or 1e3 ({value!r})")
    if kind is float and isinstance(value, str) and not _is_number(value, float):
        problems.append(f"{key}: a number is wanted, such as 0.1 or 1e-3 ({value!r})")
    return value


def _is_number(text: str, kind: type[int] | type[float]) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


# What other trainers call it.
_OTHER_NAMES = {
    "lr": "optimizer.learning_rate",
    "max_lr": "optimizer.learning_rate",
    "wd": "optimizer.weight_decay",
    "batch_size": "training.global_batch_size",
    "train_batch_size": "training.global_batch_size",
    "per_device_train_batch_size": "training.micro_batch_size",
    "device_batch_size": "training.micro_batch_size",
    "seq_len": "training.sequence_length",
    "seq_length": "training.sequence_length",
    "context_length": "training.sequence_length",
    "block_size": "training.sequence_length",
    "max_steps": "training.total_steps",
    "steps": "training.total_steps",
    "iters": "training.total_steps",
    "max_iters": "training.total_steps",
    "max_tokens": "training.total_tokens",
    "warmup_steps": "schedule.warmup",
    "warmup": "schedule.warmup",
    "grad_clip": "optimizer.gradient_clipping",
    "max_grad_norm": "optimizer.gradient_clipping",
    "output_dir": "run_root",
    "run_name": "name",
    "data_dir": "corpus.directory",
    "dtype": "precision.compute",
    "save_steps": "checkpoint.interval",
    "save_interval": "checkpoint.interval",
    "eval_steps": "evaluation.interval",
    "eval_interval": "evaluation.interval",
    "log_interval": "logging.interval",
}


def other_name(key: str, known: typing.Collection[str]) -> str | None:
    """The one of `known` that `key` is meant to be: by what other trainers call it, or by its last part alone."""
    last = key.rpartition(".")[2].replace("-", "_").lower()
    if (name := _OTHER_NAMES.get(last)) in known:
        return name
    same = [one for one in known if one.rpartition(".")[2] == last]
    return same[0] if len(same) == 1 else None


def with_dashes_and_spaces(arguments: typing.Sequence[str], known: typing.Collection[str]) -> Iterator[tuple[str, str]]:
    """(argument as one text, problem or "") of each argument, where `--key value` and `key = value` are one."""
    rest = list(arguments)
    while rest:
        given = rest.pop(0)
        key, equals, value = given.partition("=")
        name = key.strip().lstrip("-")
        dashed, spaced = given.startswith("-"), bool(equals) and key != key.rstrip()
        if not equals and rest and rest[0].startswith("="):
            equals, spaced = "=", True
            value = rest.pop(0)[1:]
            given += f" ={value}"
        if not value and rest and "=" not in rest[0] and not rest[0].startswith(("-", "~")) and (dashed or equals):
            value = rest.pop(0)
            given += f" {value}"
            spaced = True
        if dashed or spaced:
            name = other_name(name, known) or name
            yield given, f"'{given}': settings are typed without dashes and spaces: {name}={value.strip() or 'VALUE'}"
        elif not equals and not given.startswith("~"):
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            name = other_name(name, known) or (nearest[0] if nearest else name)
            if name in known:
                yield given, f"'{given}': no value is given; settings are typed key=value, such as {name}=VALUE"
            else:
                yield given, f"'{given}': no key is given; settings are typed key=value, such as KEY={given}"
        else:
            yield given, ""

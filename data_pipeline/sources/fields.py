"""Fields of records: how the name of one leads to its value, also where it has dots, and which ones there are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from data_pipeline.sources.json_size import MOST_BYTES, parsed_bytes

# Fields that a message names, and characters of each.
SHOWN_FIELDS = 20
SHOWN_CHARACTERS = 80
# A string of which parsing takes more memory than this is no JSON.
MAX_PARSED_BYTES = 1 << 26


def look_up(record: Any, field: str) -> Any:
    """The value of a field, whose dots may be part of names or lead into nested fields; None where there is none.

    Longer names come first. A string on the way is read as JSON (`meta` of some SlimPajama copies).
    """
    fields = _fields(record)
    if fields.get(field) is not None:
        return fields[field]
    for name in _beginnings(field):
        if name in fields:
            value = look_up(fields[name], field[len(name) + 1 :])
            if value is not None:
                return value
    return None


def columns_of(field: str, names: list[str]) -> list[str]:
    """Which of the columns `names` the look-up of `field` looks into."""
    return [name for name in (field, *_beginnings(field)) if name in names]


def describe_fields(record: dict[str, Any]) -> str:
    """The names of a record's fields, with those of the fields in them."""
    names = []
    for name, value in record.items():
        inner = _fields(value) if isinstance(value, dict) or isinstance(value, str) and value.startswith("{") else {}
        names += [f"{name}.{key}" for key in inner] or [name]
    shown = [f"{name[:SHOWN_CHARACTERS]}..." if len(name) > SHOWN_CHARACTERS else name for name in names]
    more = f" and {len(names) - SHOWN_FIELDS} more" if len(names) > SHOWN_FIELDS else ""
    return ", ".join(shown[:SHOWN_FIELDS]) + more or "none"


def _beginnings(field: str) -> Iterator[str]:
    """What of `field` comes before one of its dots, the longest first."""
    end = field.rfind(".")
    while end >= 0:
        yield field[:end]
        end = field.rfind(".", 0, end)


def _fields(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        is_long = len(value) * MOST_BYTES > MAX_PARSED_BYTES
        if is_long and parsed_bytes(value.encode("utf-8", "surrogatepass")) > MAX_PARSED_BYTES:
            return {}
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}

"""What the documentation's tables say of files: their keys and the types of the values."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
TYPES = {
    "bool": bool,
    "int": int,
    "integer": int,
    "float": (int, float),
    "str": str,
    "string": str,
    "object": dict,
    "list": list,
    "null": type(None),
}


def table(page: str, first_heading: str) -> list[list[str]]:
    """The rows, as cells, of the table of docs/`page` whose first column is headed `first_heading`."""
    blocks = re.findall(r"(?:^\|.*\n)+", (DOCS / page).read_text(encoding="utf-8"), flags=re.M)
    rows = [[[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in b.splitlines()] for b in blocks]
    (found,) = [block for block in rows if block[0][0] == first_heading]
    return found[2:]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def keys_and_types(rows: list[list[str]]) -> dict[str, str]:
    """Key -> type in words, of rows whose last columns are key, type and meaning."""
    return {key: row[-2] for row in rows for key in quoted(row[-3])}


def has_type(value: object, words: str) -> bool:
    """Whether a JSON value is of a type such as "int", "float or null", "integer, bytes" or "hex sha256"."""
    return any(_is_one(value, part.split(",")[0].strip()) for part in words.split(" or "))


def _is_one(value: object, word: str) -> bool:
    if word.startswith("list of "):
        return isinstance(value, list) and all(_is_one(item, word.removeprefix("list of ")) for item in value)
    if word.split()[0] == "hex":
        return isinstance(value, str) and re.fullmatch("[0-9a-f]+", value) is not None
    return isinstance(value, TYPES[word]) and isinstance(value, bool) == (word == "bool")

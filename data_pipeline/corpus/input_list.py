"""Lines of inputs.jsonl: what became of the records of every input file, and sums over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conf.stored_values import fits
from data_pipeline.errors import CorpusError

INPUTS_FILE = "inputs.jsonl"
# Key -> its type; those that corpora of earlier versions lack may be null.
_KEYS: dict[str, Any] = {
    "file": str,
    "bytes": int | None,
    "records": int,
    "documents": int,
    "rejected": dict[str, int],
    "repaired": dict[str, int],
    "unit": int,
    "lost": dict[str, int] | None,
    "row_groups": list[int] | None,
}


def is_input_line(entry: object) -> bool:
    """Whether a JSON value is a line of inputs.jsonl."""
    return isinstance(entry, dict) and all(fits(entry.get(key), kind) for key, kind in _KEYS.items())


def read_input_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of an inputs.jsonl. Raises CorpusError where one is none."""
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise CorpusError(f"{path}: cannot be read ({error}); restore it") from None
    for number, line in enumerate(lines, 1):
        if not is_input_line(line):
            raise CorpusError(f"{path}: line {number} is no account of an input file; restore it")
    return lines


def sum_counts(files: list[dict[str, Any]], key: str) -> dict[str, int]:
    """Sums over some lines of inputs.jsonl: reason -> records of "rejected" or "repaired"; "lost": see InputsEntry."""
    sums: dict[str, int] = {}
    for entry in files:
        for reason, count in (entry.get(key) or {}).items():
            sums[reason] = sums.get(reason, 0) + count
    return dict(sorted(sums.items()))


def count_files(entries: list[dict[str, Any]]) -> int:
    """Input files in lines of inputs.jsonl, of which a file that was read in parts has several."""
    # Corpora that were prepared before files were read in parts lack the key.
    return sum(not entry.get("row_groups") or entry["row_groups"][0] == 0 for entry in entries)

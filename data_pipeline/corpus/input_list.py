"""Lines of inputs.jsonl: what became of the records of every input file, and sums over them."""

from __future__ import annotations

from typing import Any

INPUTS_FILE = "inputs.jsonl"


def sum_counts(files: list[dict[str, Any]], key: str) -> dict[str, int]:
    """Sums over some lines of inputs.jsonl: reason -> records of "rejected" or "repaired"; "lost": see InputsEntry."""
    sums: dict[str, int] = {}
    for entry in files:
        for reason, count in entry.get(key, {}).items():
            sums[reason] = sums.get(reason, 0) + count
    return dict(sorted(sums.items()))


def count_files(entries: list[dict[str, Any]]) -> int:
    """Input files in lines of inputs.jsonl, of which a file that was read in parts has several."""
    # Corpora that were prepared before files were read in parts lack the key.
    return sum(not entry.get("row_groups") or entry["row_groups"][0] == 0 for entry in entries)

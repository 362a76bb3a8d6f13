"""Which collective each rank waits in, and who has not entered it, by what torch's flight recorder has of each rank."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class GroupRecord:
    """What one rank has done in one of its process groups."""

    # The group's name and what it is for, the same on all of its ranks.
    group: str
    # Its ranks; [] where that is not known.
    ranks: list[int]
    # Collectives are numbered by each group, from 1 on: the last that this rank began, and the last that is done.
    entered: int
    finished: int
    # What collectives were, by their numbers: those that are not done, and the last one begun.
    operations: dict[str, str]
    # Transfers to or from single ranks that were begun and are not done.
    transfers: list[str]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> GroupRecord:
        return cls(**content)


def group_records(dump: bytes) -> list[GroupRecord]:
    """What a rank's own recorder holds (`train.parallel.flight_recorder`), by group."""
    found = pickle.loads(dump)
    members = {
        (config["name"], config["desc"]): json.loads(config["ranks"] or "[]")
        for config in found.get("pg_config", {}).values()
    }
    by_group: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in found.get("entries", []):
        by_group.setdefault(tuple(entry["process_group"]), []).append(entry)
    records = []
    for (name, purpose), entries in by_group.items():
        status = found.get("pg_status", {}).get(str(entries[0]["pg_id"]), {})
        collectives = {entry["collective_seq_id"]: _describe(entry) for entry in entries if not entry["is_p2p"]}
        # -1 before the first.
        finished = max(0, int(status.get("last_completed_collective", 0)))
        entered = max(int(status.get("last_enqueued_collective", 0)), finished, *collectives)
        operations = {str(number): words for number, words in collectives.items() if number > finished}
        if entered in collectives:
            operations[str(entered)] = collectives[entered]
        transfers = [
            _describe(entry)
            for entry in entries
            if entry["is_p2p"] and not entry["retired"] and entry["state"] != "completed"
        ]
        ranks = [int(rank) for rank in members.get((name, purpose), [])]
        records.append(GroupRecord(_group(name, purpose), ranks, entered, finished, operations, transfers))
    return records


def as_json(records: Iterable[GroupRecord]) -> str:
    """For the board."""
    return json.dumps([asdict(record) for record in records])


def from_json(text: str) -> list[GroupRecord]:
    """What `as_json` wrote."""
    return [GroupRecord.from_json(content) for content in json.loads(text)]


def describe_collectives(of_ranks: Mapping[int, Sequence[GroupRecord]], world_size: int) -> list[str]:
    """Who waits in which collective and who has not entered it, one line a group; [] where nobody waits.

    `of_ranks`: the records of the ranks that could tell.
    """
    groups: dict[str, dict[int, GroupRecord]] = {}
    for rank, records in of_ranks.items():
        for record in records:
            groups.setdefault(record.group, {})[rank] = record
    lines = []
    for group, found in groups.items():
        known = [record.ranks for record in found.values() if record.ranks]
        # Where torch does not say who is in a group, all may be that do not tell.
        may_be = [rank for rank in range(world_size) if rank in found or rank not in of_ranks]
        line = _who_waits(found, known[0] if known else may_be)
        if line:
            lines.append(f"process group {group}: {line}")
    return lines


def _who_waits(records: Mapping[int, GroupRecord], members: Sequence[int]) -> str:
    """The first collective that is not done, of one group; "" where all are."""
    # What one rank has behind it all have entered; some recorders notice late that a collective is done.
    first = max(record.finished for record in records.values()) + 1
    inside = [rank for rank, record in records.items() if record.entered >= first]
    words = []
    if inside:
        operation = next(
            (found for rank in inside if (found := records[rank].operations.get(str(first)))), "collective"
        )
        words.append(f"{_ranks(inside)} entered #{first}, {operation}")
        outside: dict[tuple[int, str], list[int]] = {}
        for rank, record in records.items():
            if rank not in inside:
                last = record.operations.get(str(record.entered), "")
                outside.setdefault((record.entered, last), []).append(rank)
        words += [
            f"{_ranks(behind)} did not, the last there is #{entered}{last and f', {last}'}"
            for (entered, last), behind in outside.items()
        ]
    if silent := [rank for rank in members if rank not in records]:
        words += [f"of {_ranks(silent)} nothing is known"] if words else []
    for rank, record in records.items():
        words += [f"rank {rank} waits in {transfer}" for transfer in record.transfers]
    return "; ".join(words)


def _group(name: str, purpose: str) -> str:
    return f"{name} ({purpose})" if purpose and purpose != "undefined" else name


def _describe(entry: Mapping[str, Any]) -> str:
    shapes = ", ".join("x".join(map(str, size)) or "scalar" for size in entry["input_sizes"])
    return f"{entry['profiling_name']} of {shapes}" if shapes else str(entry["profiling_name"])


def _ranks(ranks: Iterable[int]) -> str:
    """rank 3; ranks 0-6, 9."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    told = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank {told}" if told.isdecimal() else f"ranks {told}"

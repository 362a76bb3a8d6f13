"""How each rank of a start ended: `logs/rank-NNNNN.end.json`, written by the rank itself.

    {"format_version": 1, "attempt": "...", "rank": 1, "process": 4711, "host": "...", "ended": 1764419000.25,
     "kind": "error", "message": "...", "stack": "...", "position": "'data' of step 12", "because_of": null}

A rank that is killed from outside writes none.
"""

from __future__ import annotations

import json
import os
import platform
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from conf.passwords import without_passwords
from conf.stored_values import misfits
from train.run_directory import RunDirectory, read_lines, write_atomically

FORMAT_VERSION = 1
# What a rank ended with: an exception, a phase that took too long, a signal; or nothing of its own, and others say it.
ERROR, HANG, SIGNAL, GONE = "error", "hang", "signal", "gone"


@dataclass(frozen=True)
class End:
    """The end of one rank."""

    attempt: str
    rank: int
    process: int
    host: str
    # Seconds since 1970, by the clock of its host.
    ended: float
    kind: str
    message: str
    # Where its thread that trains was; "" where that is not known.
    stack: str
    position: str
    # The rank without which this one would not have ended; None: it ended by itself.
    because_of: int | None = None

    def as_json(self) -> str:
        return json.dumps(without_passwords({"format_version": FORMAT_VERSION, **asdict(self)}))

    def as_event(self, found_by: str = "this start") -> dict[str, object]:
        """What events.jsonl has of the end that ended a run."""
        fields = asdict(self)
        return {name: value for name, value in fields.items() if name != "because_of"} | {"found_by": found_by}

    @classmethod
    def from_event(cls, event: Mapping[str, Any]) -> End:
        """What `as_event` made an event of."""
        return cls(**{name: event[name] for name in cls.__dataclass_fields__ if name != "because_of"})

    @classmethod
    def from_json(cls, content: dict[str, object]) -> End | None:
        """None for what another version, or another program, wrote."""
        fields = {name: value for name, value in content.items() if name != "format_version"}
        if content.get("format_version") != FORMAT_VERSION or misfits(cls, fields):
            return None
        return cls(**fields)  # type: ignore[arg-type]


def end_of(error: BaseException, rank: int, attempt: str, position: str) -> End:
    """The end of this process, which fails with `error`."""
    stack = "".join(traceback.format_exception(error))
    message = str(error) or repr(error)
    return End(attempt, rank, os.getpid(), platform.node(), time.time(), ERROR, message, stack, position)


def write_end(directory: RunDirectory, end: End) -> None:
    """Leave the rank's end in the run's folder."""
    write_atomically(directory.end(end.rank), end.as_json())


def read_ends(directory: RunDirectory, attempt: str) -> list[End]:
    """The ends of an attempt's ranks; those that cannot be read are left out."""
    found = [
        End.from_json(content) for path in sorted(directory.logs.glob("*.end.json")) for content in read_lines(path)
    ]
    return [end for end in found if end is not None and end.attempt == attempt]


def remove_ends(directory: RunDirectory) -> None:
    """Delete what earlier starts left, files that were being written among it."""
    for path in directory.logs.glob("*.end.json*"):
        path.unlink(missing_ok=True)


def unreported_end(directory: RunDirectory, attempt: str) -> End | None:
    """What ended a start that events.jsonl has no word of; None where it has, or where there was no such start."""
    events = read_lines(directory.events)
    if not attempt or any(event.get("attempt") == attempt and event.get("event") == "error" for event in events):
        return None
    if (first := first_failure(read_ends(directory, attempt))) is not None:
        return first
    started = [event for event in events if event.get("event") in ("start", "resume", "complete", "stop", "error")]
    if not started or started[-1]["event"] not in ("start", "resume"):
        return None
    return End(
        attempt,
        rank=0,
        process=0,
        host="",
        ended=0.0,
        kind=GONE,
        message="without a word of any rank, as after SIGKILL, a machine that was lost, or one whose memory was out",
        stack="",
        position="",
    )


def first_failure(ends: Iterable[End]) -> End | None:
    """The end that the others followed from: the earliest of those that have no other rank as their reason."""
    return min((end for end in ends if end.because_of is None), key=lambda end: end.ended, default=None)

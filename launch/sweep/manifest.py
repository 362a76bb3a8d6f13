"""The manifest of a sweep, `manifest.json` in its folder: written before anything runs, a row for each run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf import ConfigError
from conf.problems import other_format
from conf.stored_values import misfits
from train.run_directory import write_atomically
from train.stored_configuration import differences, written

FORMAT_VERSION = 1
KIND = "xlstm-pretrain sweep"
FILE = "manifest.json"
# A run by itself; the long run at a constant rate that branches begin from; such a branch.
RUN, TRUNK, BRANCH = "run", "trunk", "branch"
ROLES = (RUN, TRUNK, BRANCH)
# Rows that a message names.
_MOST_NAMED = 3


@dataclass(frozen=True)
class Row:
    """One run of a sweep."""

    # Also of its folder, in runs/ of the sweep's.
    name: str
    role: str
    family: str
    # Tokens of a training sequence.
    context: int
    seed: int
    # All of them, embedding included.
    parameters: int
    # At its end, counted from the first step of its trunk where it is a branch; the same of `tokens` and `flops`.
    steps: int
    tokens: int
    # Training FLOPs of these tokens, counted exactly.
    flops: float
    # What the row itself computes of them.
    own_flops: float
    # Nominal FLOPs of the IsoFLOP curve that the run belongs to; null: on none.
    budget: float | None
    # Of a branch: the trunk's row, and the step at which the branch leaves it.
    parent: str | None
    parent_step: int | None
    # What `python -m train` takes, but for the run's name, folder and origin.
    overrides: list[str]
    # The job of the run.
    nodes: int
    processes: int
    # Predicted wall-clock; null: nothing predicts it.
    hours: float | None

    @property
    def gpu_hours(self) -> float | None:
        """Predicted cost: hours times processes."""
        return None if self.hours is None else self.hours * self.processes


@dataclass(frozen=True)
class LeftOut:
    """A run that the sweep's own limits left out."""

    name: str
    # The key of the sweep by which it did.
    key: str
    tokens_per_parameter: float


@dataclass(frozen=True)
class Manifest:
    """What `sweep plan` has decided."""

    name: str
    # Of the command that planned it.
    arguments: list[str]
    # The sweep and its machines, resolved.
    configuration: dict[str, Any]
    rows: list[Row]
    left_out: list[LeftOut]

    def row(self, name: str) -> Row:
        """The row of this name. Raises KeyError."""
        return next(row for row in self.rows if row.name == name)


class SweepFolder:
    """Paths below a sweep's folder. Making the object creates nothing."""

    def __init__(self, path: Path):
        self.path = path
        self.manifest = path / FILE
        self.runs = path / "runs"
        # A folder for each array of jobs: its script, code, rows.
        self.submissions = path / "launch"
        self.lock = path / "sweep.lock"

    def run(self, row: Row | str) -> Path:
        """The folder of a row's run."""
        return self.runs / (row if isinstance(row, str) else row.name)

    def origin(self, row: Row) -> str | None:
        """Where a branch begins, as `resume_from` has it; None for other rows."""
        return None if row.parent is None else f"{self.run(row.parent)}@{row.parent_step}"

    def settings(self, row: Row) -> list[str]:
        """The settings that name a row's run, its place and where it begins."""
        begins = [] if (origin := self.origin(row)) is None else [f'resume_from="{origin}"']
        return [f"name={row.name}", f'run_root="{self.runs}"', *begins]


def is_sweep(path: Path) -> bool:
    """Whether `path` is the folder of a sweep."""
    return (path / FILE).is_file()


def write_manifest(manifest: Manifest, folder: SweepFolder) -> None:
    """Write `manifest.json`, whole or not at all."""
    content = dataclasses.asdict(manifest)
    stored = {"kind": KIND, "format_version": FORMAT_VERSION, "sha256": _checksum(content), **content}
    folder.path.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.manifest, json.dumps(stored, indent=1) + "\n")


def read_manifest(folder: SweepFolder) -> Manifest:
    """What `write_manifest` wrote. Raises ConfigError where there is none, it is another's, or it is damaged."""
    file = folder.manifest
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            [f"{folder.path}: is no folder of a sweep, it has no {FILE}; make one with `sweep plan`"]
        ) from None
    except NotADirectoryError:
        raise ConfigError([f"{folder.path}: is a file; name the folder of a sweep"]) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError([_damaged(file, f"is no JSON: {error}")]) from None
    if not isinstance(stored, dict) or stored.get("kind") != KIND:
        raise ConfigError([f"{file}: is no manifest of a sweep; name the folder that `sweep plan` wrote"])
    if problem := other_format(file, stored.get("format_version"), FORMAT_VERSION):
        raise ConfigError([problem])
    content = {key: value for key, value in stored.items() if key not in ("kind", "format_version", "sha256")}
    if problems := _misfits(content):
        raise ConfigError([_damaged(file, problem) for problem in problems])
    if stored.get("sha256") != _checksum(content):
        raise ConfigError([_damaged(file, "is not what was planned: its checksum is another")])
    rows = [Row(**row) for row in content["rows"]]
    left_out = [LeftOut(**one) for one in content["left_out"]]
    return Manifest(**{**content, "rows": rows, "left_out": left_out})


def _damaged(file: Path, problem: str) -> str:
    return f"{file}: {problem}; restore it, or plan the sweep again with --replace: rows that have begun must stay"


def _misfits(content: dict[str, Any]) -> list[str]:
    # Row by row first: of a row that does not fit the whole would say no more than that.
    rows = content.get("rows")
    problems = [
        problem
        for number, row in enumerate(rows if isinstance(rows, list) else [])
        for problem in misfits(Row, row, f"rows[{number}].")
    ]
    if problems := problems or misfits(Manifest, content):
        return problems
    names = [row["name"] for row in content["rows"]]
    return [
        f"rows[{number}].role is none of {', '.join(ROLES)} ({row['role']})"
        for number, row in enumerate(content["rows"])
        if row["role"] not in ROLES
    ] + [f"two rows are named {name}" for name in dict.fromkeys(names) if names.count(name) > 1]


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def compare(before: Manifest, now: Manifest) -> list[str]:
    """What differs between two manifests of a sweep, one line each: settings, then rows."""
    lines = [
        f"{key}: {written(old)} -> {written(new)}"
        for key, (old, new) in differences(before.configuration, _as_stored(now.configuration)).items()
        # A sweep's folder may be moved as a whole, and predictions may come later.
        if key not in ("sweep.root", "sweep.gpu")
    ]
    old_rows, new_rows = ({row.name: row for row in manifest.rows} for manifest in (before, now))
    gone, added = (
        [name for name in old_rows if name not in new_rows],
        [name for name in new_rows if name not in old_rows],
    )
    changed = [name for name in old_rows if name in new_rows and not is_same_run(old_rows[name], new_rows[name])]
    for what, names in (("gone", gone), ("new", added), ("with other settings", changed)):
        if names:
            lines.append(f"rows {what}: {named(names)}")
    return lines


def is_same_run(one: Row, other: Row) -> bool:
    """Whether two rows are the same training: a prediction or the machines may differ."""
    return all(
        getattr(one, field.name) == getattr(other, field.name)
        for field in dataclasses.fields(Row)
        if field.name not in ("hours", "nodes", "processes")
    )


def _as_stored(configuration: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(configuration))
    return found


def named(names: Sequence[str]) -> str:
    """Names for a message: the first few, and how many more."""
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def by_text(problems: Iterable[tuple[str, str]], count: int) -> list[str]:
    """(row, problem) pairs as lines: what several rows share stands once, with their names. `count`: all rows."""
    rows: dict[str, list[str]] = {}
    for row, problem in problems:
        rows.setdefault(problem, []).append(row)
    return [
        f"{'all rows' if len(names) == count and count > 1 else named(names)}: {problem}"
        for problem, names in rows.items()
    ]

"""The table of runs: one row for each trained model, read from and written to CSV files of anyone's making.

Columns, in the order in which they are written (docs/scaling_laws.md):

- run: a name; optional, the file and row where it is missing.
- family: what is compared with what, such as "mlstm"; optional, the name of the file where it is missing.
- parameters: N, all of them; counted as the user likes, but the same for every row.
- tokens: D, that the run was trained on.
- flops: C, of the whole training; optional, 6 N D where there is no such column.
- context: tokens of a training sequence; optional. Losses of different contexts are never fitted together.
- loss: nats per token on one held-out set, after the last step.
- budget: nominal FLOPs of the IsoFLOP curve that the run belongs to; optional, found from `flops` where it is missing.
- excluded: why the run must not be fitted; empty for a run that is fitted.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from launch.scaling.flops import six_n_d

COLUMNS = ("run", "family", "parameters", "tokens", "flops", "context", "loss", "budget", "excluded")
REQUIRED = ("parameters", "tokens", "loss")
# What others call the same, in the order in which the names are looked for.
OTHER_NAMES = {
    "run": ("name",),
    "family": ("model", "architecture"),
    "parameters": ("num_params", "n_params", "params"),
    "tokens": ("num_tokens", "n_tokens"),
    "flops": ("compute", "training_flops"),
    "context": ("context_length", "sequence_length"),
    "loss": ("val_loss", "validation_loss"),
    "budget": ("isoflop_budget",),
}
_NUMBERS = ("parameters", "tokens", "flops", "context", "loss", "budget")
_MAY_BE_EMPTY = ("context", "budget")
# Of the problems of one reading.
_MOST_SHOWN = 20


class Group(NamedTuple):
    """What is fitted together: runs of one family with sequences of one length."""

    family: str
    # Tokens; None: not known.
    context: int | None

    def __str__(self) -> str:
        return self.family if self.context is None else f"{self.family}, context {self.context:,}"


@dataclass(frozen=True)
class ScalingRun:
    """One row of the table. The numbers of a run that is excluded may be not a number."""

    run: str
    family: str
    parameters: float
    tokens: float
    flops: float
    context: int | None
    # Nats per token.
    loss: float
    # Nominal FLOPs of its IsoFLOP curve; None: to be found, or on none.
    budget: float | None = None
    # Why it is not fitted; empty: it is.
    excluded: str = ""

    @property
    def group(self) -> Group:
        return Group(self.family, self.context)


@dataclass(frozen=True)
class RunTable:
    """Every run that was read, and what a reader should know of how.

    Attributes:
        notes: sentences, such as that FLOPs were estimated.
    """

    runs: list[ScalingRun]
    notes: list[str]

    @property
    def used(self) -> list[ScalingRun]:
        return [run for run in self.runs if not run.excluded]

    @property
    def excluded(self) -> list[ScalingRun]:
        return [run for run in self.runs if run.excluded]

    def by_group(self) -> dict[Group, list[ScalingRun]]:
        """The runs that are fitted, by what is fitted together, in the order of the names."""
        groups: dict[Group, list[ScalingRun]] = {}
        for run in self.used:
            groups.setdefault(run.group, []).append(run)
        return dict(sorted(groups.items(), key=lambda item: (item[0].family, item[0].context or 0)))


def read_runs(paths: Sequence[Path], columns: Mapping[str, str] | None = None) -> RunTable:
    """The runs of one or several CSV files; those that repeat an earlier one are marked as excluded.

    Args:
        columns: documented name -> name in the files, for columns that they call otherwise.

    Raises ValueError with every problem of every file: a missing file or column, rows with what is wrong in each.
    """
    columns = dict(columns or {})
    problems = [
        f"--column {name}={theirs}: there is no column {name}; the columns are {', '.join(COLUMNS)}"
        for name, theirs in columns.items()
        if name not in COLUMNS
    ]
    runs: list[ScalingRun] = []
    notes: list[str] = []
    for path in paths:
        try:
            # utf-8-sig: spreadsheets begin a file with a byte order mark.
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            problems.append(f"{path}: no such file; name a CSV file of runs")
            continue
        except IsADirectoryError:
            problems.append(f"{path}: is a folder; gather the runs in it with `collect` first")
            continue
        except UnicodeDecodeError:
            problems.append(f"{path}: is no text in UTF-8; save the table as CSV in UTF-8")
            continue
        found = _read(path, text, columns)
        problems += found.problems
        runs += found.runs
        notes += found.notes
    if problems:
        shown = problems[:_MOST_SHOWN]
        rest = [f"... and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise ValueError(f"{_count(len(problems), 'problem')} in the table of runs:\n" + _bullets([*shown, *rest]))
    return RunTable(mark_repeated(runs), notes)


def mark_repeated(runs: Iterable[ScalingRun]) -> list[ScalingRun]:
    """The runs, those with exactly the figures of an earlier one marked: published tables list some of them twice.

    Two trainings never end with the same loss to the last digit, so the same figures are the same run; counted twice
    it would make intervals too narrow.
    """
    first: dict[tuple[object, ...], str] = {}
    marked = []
    for run in runs:
        figures = (run.family, run.context, run.parameters, run.tokens, run.flops, run.loss)
        if not run.excluded and figures in first:
            run = replace(run, excluded=f"has exactly the figures of {first[figures]}")
        elif not run.excluded:
            first[figures] = run.run
        marked.append(run)
    return marked


def as_csv(runs: Iterable[ScalingRun]) -> str:
    """The table as a CSV file that `read_runs` reads back to the same numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in runs:
        writer.writerow([_written(getattr(run, column)) for column in COLUMNS])
    return text.getvalue()


class _Read(NamedTuple):
    runs: list[ScalingRun]
    notes: list[str]
    problems: list[str]


def _read(path: Path, text: str, columns: Mapping[str, str]) -> _Read:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    header = [name.strip() for name in rows.fieldnames or []]
    rows.fieldnames = header
    theirs, problems = _columns(path, header, columns)
    if problems:
        return _Read([], [], problems)
    runs = []
    for number, row in enumerate(rows, 1):
        texts = {name: (row.get(column) or "").strip() for name, column in theirs.items()}
        where = f"{path.name}, row {number}"
        wrong = _wrong_values(texts)
        if None in row:
            wrong.append(f"has more values than the header has names ({len(header)})")
        if wrong:
            named = f" ({texts['run']})" if texts.get("run") else ""
            problems += [f"{path}, row {number}, line {rows.line_num}{named}: {problem}" for problem in wrong]
        else:
            runs.append(_run(texts, where, path.stem))
    if problems:
        problems.append("correct these rows, or write into their column 'excluded' why they must not be fitted")
    elif not runs:
        problems = [f"{path}: has no rows; write one for each run"]
    notes = []
    if "flops" not in theirs:
        notes.append(f"{path.name} has no column flops; the FLOPs of its runs are 6 x parameters x tokens")
    return _Read(runs, notes, problems)


def _columns(path: Path, header: Sequence[str], chosen: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """(documented name -> name in the file, problems)."""
    found, problems = {}, []
    for name in COLUMNS:
        candidates = [chosen[name]] if name in chosen else [name, *OTHER_NAMES.get(name, ())]
        there = [candidate for candidate in candidates if candidate in header]
        if there:
            found[name] = there[0]
        elif name in chosen or name in REQUIRED:
            looked_for = " or ".join(candidates)
            problems.append(
                f"{path}: has no column {looked_for} (its columns: {', '.join(header) or 'none'}); "
                f"say which one it is with --column {name}=THEIRS"
            )
    return found, problems


def _wrong_values(texts: Mapping[str, str]) -> list[str]:
    if texts.get("excluded"):
        return []
    problems = []
    for name in _NUMBERS:
        text = texts.get(name)
        if text is None or (text == "" and name in _MAY_BE_EMPTY):
            continue
        value = _number(text)
        if text == "":
            problems.append(f"{name} is empty")
        elif math.isnan(value):
            problems.append(f"{name} is no number ({text})")
        elif not 0 < value < math.inf:
            problems.append(f"{name} must be positive and finite ({text})")
        elif name == "context" and value != int(value):
            problems.append(f"{name} must be a whole number of tokens ({text})")
    return problems


def _run(texts: Mapping[str, str], where: str, file: str) -> ScalingRun:
    numbers = {name: _number(texts.get(name, "")) for name in _NUMBERS}
    estimated = six_n_d(numbers["parameters"], numbers["tokens"])
    return ScalingRun(
        run=texts.get("run") or where,
        family=texts.get("family") or file,
        parameters=numbers["parameters"],
        tokens=numbers["tokens"],
        flops=numbers["flops"] if "flops" in texts else estimated,
        context=int(numbers["context"]) if math.isfinite(numbers["context"]) else None,
        loss=numbers["loss"],
        budget=numbers["budget"] if math.isfinite(numbers["budget"]) else None,
        excluded=texts.get("excluded", ""),
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _written(value: object) -> object:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        # The shortest text that gives the same number.
        return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return value


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"  - {line}" for line in lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

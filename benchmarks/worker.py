"""One implementation over all its cases, in a process of its own: a compiler that aborts takes only itself along.

It writes one JSON object a line: {"begin": case} when it turns to a case, then the row of the case.
"""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import TextIO

import torch

from benchmarks.cases import Case
from benchmarks.correctness import beyond_limits, errors, odd_case
from benchmarks.peers import Contender
from benchmarks.timing import measure, measure_graph, peak_memory

# Input sets in turn: as many as hold several times the L2 cache together, and no fewer than two.
INPUT_SETS_BYTES = 2**29


def warm_up(contender: Contender, cases: list[Case], device: torch.device, dtype: torch.dtype) -> None:
    """Compile everything the cases need, into the caches on disk."""
    for case in cases:
        try:
            call = contender.prepare(case, case.inputs(0, device, dtype))
            call.forward_only()
            call.both()
        except Exception as error:  # The worker that measures says why.
            print(f"{contender.name}, {case.name}: {reason(error)}", flush=True)
        call = None
        _free()


def run(
    contender: Contender,
    cases: list[Case],
    device: torch.device,
    dtype: torch.dtype,
    *,
    is_ours: bool,
    seconds: float,
    deadline: float,
    rows: Path,
) -> None:
    """Judge and time each case, and append a row for each to `rows`.

    Args:
        contender, cases, device, dtype: what to run, on what.
        is_ours: refuse to time a case that is not within the limits.
        seconds: how long to time each thing.
        deadline: time.time() after which no case begins.
        rows: file of JSON lines.
    """
    with rows.open("a", encoding="utf-8") as out:
        for case in cases:
            _write(out, {"begin": case.name})
            row = {"case": case.name, "contender": contender.name}
            if time.time() > deadline:
                row["failure"] = "out of time"
            else:
                try:
                    row.update(_judge_and_time(contender, case, device, dtype, is_ours, seconds))
                except Exception as error:
                    row["failure"] = reason(error)
            _write(out, row)
            _free()


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]


def _judge_and_time(
    contender: Contender, case: Case, device: torch.device, dtype: torch.dtype, is_ours: bool, seconds: float
) -> dict:
    # The first input set that is timed below.
    found = errors(contender, case, device, dtype, seed=0)
    row: dict = {"errors": found}
    if is_ours:
        wrong = beyond_limits(case, found)
        short = errors(contender, odd_case(case), device, dtype, seed=2)
        wrong += [f"short case: {line}" for line in beyond_limits(case, short)]
        row["short_errors"] = short
        if wrong:
            row["failure"] = "gate: " + "; ".join(wrong)
            return row
    _free()
    inputs = case.inputs(0, device, dtype)
    size = sum(part.nbytes for part in inputs.values())
    sets = 2 + INPUT_SETS_BYTES // size if device.type == "cuda" else 2
    calls = [contender.prepare(case, inputs)]
    calls += [contender.prepare(case, case.inputs(seed, device, dtype)) for seed in range(3, 2 + min(sets, 4))]
    del inputs
    for part in ("forward", "both"):
        work = [call.forward_only if part == "forward" else call.both for call in calls]
        work[0]()
        row[part] = measure(work, device, seconds, hide_host=True)
        row[f"{part}_memory"] = peak_memory(work[0], device)
        if case.kind == "mlstm" and case.batch == 1 and device.type == "cuda":
            row[f"{part}_with_host"] = measure(work, device, seconds, hide_host=False)
            try:
                row[f"{part}_graph"] = measure_graph(work[0], device, seconds)
            except Exception as error:
                row[f"{part}_graph_failure"] = reason(error)
                # A capture that failed leaves the stream unusable for what follows.
                torch.cuda.synchronize(device)
    return row


def _write(out: TextIO, row: dict) -> None:
    out.write(json.dumps(row) + "\n")
    out.flush()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()

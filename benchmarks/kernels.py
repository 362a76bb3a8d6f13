"""Our kernels against others', on the same inputs, in one run: python -m benchmarks.kernels --help.

Each implementation has a process of its own. First all of them compile at once, then they are judged and timed one
after the other, so that nothing else runs on the device. Start it with -m: as a file, its folder would hide our
package `kernels`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import report, worker
from benchmarks.cases import Case, select
from benchmarks.peers import Contender, ours, select_peers
from benchmarks.timing import ROOT, ceilings, environment

DTYPE = torch.bfloat16
CEILINGS = "ceilings"


def main() -> None:
    """The command line; as a worker with --worker, which the program itself adds."""
    arguments = _arguments()
    if arguments.worker:
        _work(arguments)
    else:
        _lead(arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description="Kernels against their peers.")
    parser.add_argument("--cases", default="all", help="names, mlstm, slstm or all, separated by commas")
    parser.add_argument("--peers", default="default", help="names, default, nvcc, all or none, separated by commas")
    parser.add_argument("--backend", default="triton", help="ours: triton or reference")
    parser.add_argument("--settings", type=json.loads, default={}, help='ours: {"mlstm": {...}, "slstm": {...}}')
    parser.add_argument("--seconds", type=float, default=480, help="stop after this long, whatever is missing")
    parser.add_argument("--compile-seconds", type=float, default=200, help="of those, at most this for compiling")
    parser.add_argument("--timing-seconds", type=float, default=0.5, help="about how long to repeat each call")
    default = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results"))
    parser.add_argument("--output", type=Path, default=default, help="folder of the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="what to record where there is no git repository")
    for hidden in ("--worker", "--deadline", "--rows"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        arguments.selected = select(arguments.cases)
        arguments.contenders = _contenders(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _contenders(arguments: argparse.Namespace) -> list[Contender]:
    kinds = {case.kind for case in arguments.selected}
    everyone = ours(arguments.backend, arguments.settings) + select_peers(arguments.peers)
    return [contender for contender in everyone if contender.kind in kinds]


def _work(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    rows = Path(arguments.rows)
    if arguments.worker == CEILINGS:
        rows.write_text(json.dumps({"ceilings": ceilings(device)}) + "\n", encoding="utf-8")
        return
    contender = next(c for c in arguments.contenders if c.name == arguments.worker)
    cases = [case for case in arguments.selected if case.kind == contender.kind]
    if arguments.compile_only:
        worker.warm_up(contender, cases, device, DTYPE)
        return
    worker.run(
        contender,
        cases,
        device,
        DTYPE,
        is_ours=contender.name.startswith("ours"),
        seconds=arguments.timing_seconds,
        deadline=float(arguments.deadline),
        rows=rows,
    )


def _lead(arguments: argparse.Namespace) -> None:
    deadline = time.time() + arguments.seconds
    contenders = arguments.contenders
    record = environment(torch.device(arguments.device), arguments.commit)
    with tempfile.TemporaryDirectory() as folder:
        unfinished: set[str] = set()
        if arguments.device != "cpu":
            unfinished = _compile(contenders, Path(folder), time.time() + arguments.compile_seconds)
        _stage(Path(folder), CEILINGS, deadline)
        limits = next((row["ceilings"] for row in _read(Path(folder) / CEILINGS)), {})
        rows: list[dict] = []
        for contender in contenders:
            cases = [case for case in arguments.selected if case.kind == contender.kind]
            if contender.compiler and contender.name in unfinished:
                # Its half-built extension is locked: a second process would wait for the first for ever.
                failure = f"did not compile in {arguments.compile_seconds:.0f} s"
                rows += [{"case": c.name, "contender": contender.name, "failure": failure} for c in cases]
            else:
                rows += _all_cases(contender, cases, Path(folder), deadline)
            text = _write(arguments, record, limits, rows)
    picture = arguments.output / f"{_stem(record)}.png"
    report.draw(picture, record["device"], arguments.selected, contenders, rows)
    print(text)


def _compile(contenders: list[Contender], folder: Path, deadline: float) -> set[str]:
    """Let all contenders compile at once; returns who was stopped at the deadline."""
    running = {c.name: _start(folder, c.name, deadline, "--compile-only") for c in contenders}
    stopped = set()
    for name, process in running.items():
        if not _finish(process, deadline):
            stopped.add(name)
    print(f"compiled; stopped: {', '.join(sorted(stopped)) or 'none'}", flush=True)
    return stopped


def _all_cases(contender: Contender, cases: list[Case], folder: Path, deadline: float) -> list[dict]:
    """The rows of a contender. A process that dies costs the case it was at; another goes on after it."""
    rows: list[dict] = []
    while len(rows) < len(cases):
        waiting = cases[len(rows) :]
        (folder / contender.name).unlink(missing_ok=True)
        ending = _stage(folder, contender.name, deadline, "--cases", ",".join(case.name for case in waiting))
        written = [row for row in _read(folder / contender.name) if "case" in row]
        rows += written
        if len(written) < len(waiting):
            failure = ending or "process ended without a result"
            rows.append({"case": waiting[len(written)].name, "contender": contender.name, "failure": failure})
    return rows


def _stage(folder: Path, name: str, deadline: float, *more: str) -> str:
    """Run one worker; returns "" or why it did not end well."""
    began = time.time()
    if began > deadline:
        return "out of time"
    process = _start(folder, name, deadline, *more)
    # A case that has begun may run on a little, so that it is not lost.
    in_time = _finish(process, deadline + 15)
    print(f"{name}: {time.time() - began:.0f} s, exit {process.returncode}", flush=True)
    if in_time and process.returncode == 0:
        return ""
    lines = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    ending = "stopped: out of time" if not in_time else f"process ended with {process.returncode}"
    return f"{ending}: {lines[-1][:160]}" if lines else ending


def _start(folder: Path, name: str, deadline: float, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.kernels", *sys.argv[1:], *more]
    command += ["--worker", name, "--rows", str(folder / name), "--deadline", str(deadline)]
    log = (folder / f"{name}.log").open("a", encoding="utf-8")
    with log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _finish(process: subprocess.Popen, deadline: float) -> bool:
    """Wait for a worker, and end it and all that it started at the deadline; whether it ended by itself."""
    try:
        process.wait(max(0.1, deadline - time.time()))
        return True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False


def _read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    # A process that was killed may have left half a line.
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _stem(record: dict) -> str:
    return f"{record['date']}-kernels"


def _write(arguments: argparse.Namespace, record: dict, limits: dict, rows: list[dict]) -> str:
    text = report.table(record, limits, arguments.selected, arguments.contenders, rows)
    arguments.output.mkdir(parents=True, exist_ok=True)
    everything = {"environment": record, "ceilings": limits, "rows": rows}
    (arguments.output / f"{_stem(record)}.json").write_text(json.dumps(everything, indent=1), encoding="utf-8")
    (arguments.output / f"{_stem(record)}.md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    main()

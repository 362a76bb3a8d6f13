"""What do the watchdog, checks, monitors and saves cost a run? `python -m train`, with all of them and with none.

    python -m benchmarks.overheads CORPUS --output NAME.md model=xlstm_400m \
        training.sequence_length=2048 training.micro_batch_size=8 training.global_batch_size=8
    python -m benchmarks.overheads CORPUS --save-every 60 --output NAME.md model=xlstm_1b4 ...

CORPUS is a prepared corpus; its text does not matter, only that there is enough. Runs take turns, --rounds times:
`bare` has nothing switched on, `watched` has the defaults of a run, and compares replicas' weights as often as it
takes statistics. Steps up to the first statistics do not count: those compile what takes them.

With --save-every N, `saving` is `watched` with a checkpoint every N steps. What a save holds the loop for is the time
that its event tells of, and what the steps until the next one took longer than the median of `watched`.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.layouts import CONFIGURATION, run_steps  # noqa: E402
from train.run_directory import read_events  # noqa: E402

# Steps between two lots of statistics, as of a run by default.
INTERVAL = 100
BARE = [
    "watchdog.seconds=null",
    "health.window_seconds=null",
    "numbers.bad_steps=null",
    "numbers.compare_interval=0",
    "alerts=none",
]
WATCHED = [f"logging.monitor_interval={INTERVAL}", f"numbers.compare_interval={INTERVAL}"]
# Of a run whose checkpoints come every 1000 steps.
DEFAULT_INTERVAL = 1000


@dataclass(frozen=True)
class Round:
    """Seconds of the steps of each run that count, in order."""

    bare: list[float]
    watched: list[float]


@dataclass(frozen=True)
class Save:
    """Seconds that the loop waited for a save, that writing took beside it, and that the steps until the next one took
    longer than they do without."""

    held: float
    written: float
    slowed: float


def _seconds(settings: list[str], options: argparse.Namespace, folder: Path) -> dict[int, float]:
    """Step -> seconds."""
    configuration = [f"corpus.directory={options.corpus.resolve()}", *CONFIGURATION, *options.settings, *settings]
    steps = run_steps(configuration, options.steps, options.processes, folder)
    return {record["step"]: record["step_seconds"] for record in steps}


def measure_round(options: argparse.Namespace) -> Round:
    found = []
    for settings in (BARE, WATCHED):
        with tempfile.TemporaryDirectory() as folder:
            seconds = _seconds(settings, options, Path(folder))
        # The statistics of a step are taken in it, and handled before the next one ends.
        found.append([value for step, value in seconds.items() if step > INTERVAL + 1])
    return Round(*found)


def measure_saves(options: argparse.Namespace, usual: float) -> list[Save]:
    """Those that were whole before the run was ended."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [*WATCHED, f"checkpoint.interval={options.save_every}", "checkpoint.keep_last=1"]
        settings += ["logging.monitor_interval=0", "numbers.compare_interval=0"]
        seconds = _seconds(settings, options, Path(folder))
        events = [event for event in read_events(Path(folder) / "run") if event["event"] == "save"]
    saves = []
    for event in events:
        # The line of a step is written before its checkpoint, so that the next one has the time of the save.
        until = range(event["step"] + 1, event["step"] + options.save_every + 1)
        longer = sum(seconds[step] - usual for step in until if step in seconds)
        saves.append(Save(event["held_seconds"], event["seconds"], longer - event["held_seconds"]))
    return saves


def report(options: argparse.Namespace, rounds: list[Round], saves: list[Save]) -> str:
    """The result file."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [
        "# What watching and saving cost a run",
        "",
        f"- date: {datetime.date.today()}",
        f"- hardware: {options.processes} x {device}; torch {torch.__version__}",
        f"- commit: {commit.strip()}",
        f"- command: `python -m benchmarks.overheads {shlex.join(sys.argv[1:])}`",
        f"- {options.steps} steps a run, those behind the first {INTERVAL + 1} count; statistics and a comparison of "
        f"weights every {INTERVAL}",
        "",
        "| round | bare, mean ms | watched, mean ms | more | bare, median | watched, median | more |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, one in enumerate(rounds, 1):
        cells = [str(number)]
        for average in (statistics.fmean, statistics.median):
            bare, watched = average(one.bare), average(one.watched)
            cells += [f"{1e3 * bare:.2f}", f"{1e3 * watched:.2f}", f"{100 * (watched / bare - 1):+.2f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    if saves:
        usual = statistics.median(value for one in rounds for value in one.watched)
        lines += [
            "",
            "| save | loop held, s | steps slowed, s | written in, s | held and slowed, of 1,000 steps |",
            "|---|---|---|---|---|",
        ]
        for number, save in enumerate(saves, 1):
            share = (save.held + save.slowed) / (DEFAULT_INTERVAL * usual)
            lines.append(
                f"| {number} | {save.held:.2f} | {save.slowed:.2f} | {save.written:.1f} | {100 * share:.2f} % |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3 * INTERVAL + 2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--save-every", type=int, metavar="N", help="also measure saves, N steps apart")
    parser.add_argument("--output", type=Path)
    parser.add_argument("settings", nargs="*", help="of the runs, such as model=xlstm_1b4 parallel=zero1")
    options = parser.parse_intermixed_args()
    rounds: list[Round] = []
    saves: list[Save] = []
    for _ in range(options.rounds):
        rounds.append(measure_round(options))
        print(report(options, rounds, saves), flush=True)
    if options.save_every:
        saves = measure_saves(options, statistics.median(value for one in rounds for value in one.watched))
    text = report(options, rounds, saves)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

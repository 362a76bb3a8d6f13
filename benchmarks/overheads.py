"""What do the watchdog, checks, monitors and saves cost a run? `python -m train`, with all of them and with none.

    python -m benchmarks.overheads CORPUS --output NAME.md model=xlstm_400m \
        training.sequence_length=2048 training.micro_batch_size=8 training.global_batch_size=8
    python -m benchmarks.overheads CORPUS --rounds 0 --save-every 80 --steps 200 --output NAME.md model=xlstm_1b4 ...

CORPUS is a prepared corpus; its text does not matter, only that there is enough. Runs take turns, --rounds times:
`bare` has nothing switched on. `watched` has everything, with statistics every EVERY steps and a comparison of the
weights every 2 * EVERY, so that a short run has several: what such a step takes longer than the median of the others is
charged at the intervals of a run by default. Steps up to the first comparison do not count: those compile.

With --save-every N, a run writes a checkpoint every N steps and has no statistics. What a save holds the loop for is
the time that its event tells of, and what the steps until the next one took longer than those before the first.
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
from train.config import LoggingConfig, NumbersConfig  # noqa: E402
from train.run_directory import read_events  # noqa: E402

EVERY = 20
BARE = [
    "watchdog.seconds=null",
    "health.window_seconds=null",
    "numbers.bad_steps=null",
    "numbers.compare_interval=0",
    "alerts=none",
]
WATCHED = [f"logging.monitor_interval={EVERY}", f"numbers.compare_interval={2 * EVERY}"]
# Of a run whose checkpoints come every 1000 steps.
DEFAULT_INTERVAL = 1000


@dataclass(frozen=True)
class Round:
    """Seconds of a step, the medians over those of each kind."""

    bare: float
    watched: float
    # Of `watched`.
    with_statistics: float
    with_comparison: float

    @property
    def share(self) -> float:
        """What watching adds to a step on average, with the default intervals, as a share of a bare one."""
        statistics_take = self.with_statistics - self.watched
        comparison_takes = self.with_comparison - self.with_statistics
        added = self.watched - self.bare
        added += statistics_take / LoggingConfig.monitor_interval + comparison_takes / NumbersConfig.compare_interval
        return added / self.bare


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
        found.append({step: value for step, value in seconds.items() if step > 2 * EVERY + 1})
    return judged(*found)


def judged(bare: dict[int, float], watched: dict[int, float]) -> Round:
    """From the seconds of the steps that count; both are asked for at least one comparison."""
    kinds: dict[str, list[float]] = {"plain": [], "statistics": [], "comparison": []}
    for step, value in watched.items():
        kinds["plain" if step % EVERY else "statistics" if step % (2 * EVERY) else "comparison"].append(value)
    medians = [statistics.median(values) for values in kinds.values()]
    return Round(statistics.median(bare.values()), *medians)


def measure_saves(options: argparse.Namespace) -> tuple[float, list[Save]]:
    """(median seconds of a step before the first save, the saves that were whole before the run was ended)"""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"checkpoint.interval={options.save_every}", "checkpoint.keep_last=1", "numbers.compare_interval=0"]
        seconds = _seconds(settings, options, Path(folder))
        events = [event for event in read_events(Path(folder) / "run") if event["event"] == "save"]
    usual = statistics.median(seconds[step] for step in range(options.save_every // 2, options.save_every))
    saves = []
    for event in events:
        # The line of a step is written before its checkpoint, so that the next one has the time of the save.
        until = range(event["step"] + 1, event["step"] + options.save_every + 1)
        longer = sum(seconds[step] - usual for step in until if step in seconds)
        saves.append(Save(event["held_seconds"], event["seconds"], longer - event["held_seconds"]))
    return usual, saves


def report(options: argparse.Namespace, rounds: list[Round], usual: float, saves: list[Save]) -> str:
    """The result file. `usual`: seconds of a step of the run with saves."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [
        "# What watching and saving cost a run",
        "",
        f"- date: {datetime.date.today()}",
        f"- hardware: {options.processes} x {device}; torch {torch.__version__}",
        f"- commit: {commit.strip()}",
        f"- command: `python -m benchmarks.overheads {shlex.join(sys.argv[1:])}`",
    ]
    if rounds:
        lines += [
            f"- {options.steps} steps a run, those behind the first {2 * EVERY + 1} count; medians, in ms; statistics "
            f"every {EVERY} steps, charged every {LoggingConfig.monitor_interval}; a comparison of weights every "
            f"{2 * EVERY}, charged every {NumbersConfig.compare_interval}",
            "",
            "| round | bare | watched | with statistics | and a comparison | all in all |",
            "|---|---|---|---|---|---|",
        ]
    for number, one in enumerate(rounds, 1):
        figures = (one.bare, one.watched, one.with_statistics, one.with_comparison)
        cells = [str(number), *(f"{1e3 * value:.2f}" for value in figures), f"{100 * one.share:+.2f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    if saves:
        lines += [
            "",
            f"Saves, with a step of {1e3 * usual:.1f} ms before the first:",
            "",
            "| save | loop held, s | steps slowed, s | written in, s | held and slowed, of 1,000 steps |",
            "|---|---|---|---|---|",
        ]
    for number, save in enumerate(saves, 1):
        share = (save.held + save.slowed) / (DEFAULT_INTERVAL * usual)
        lines.append(f"| {number} | {save.held:.2f} | {save.slowed:.2f} | {save.written:.2f} | {100 * share:.2f} % |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8 * EVERY + 2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--save-every", type=int, metavar="N", help="also measure saves, N steps apart")
    parser.add_argument("--output", type=Path)
    parser.add_argument("settings", nargs="*", help="of the runs, such as model=xlstm_1b4 parallel=zero1")
    options = parser.parse_intermixed_args()
    if options.rounds and options.steps < 4 * EVERY:
        parser.error(f"--steps: {options.steps} have no comparison that counts; at least {4 * EVERY}")
    rounds: list[Round] = []
    for _ in range(options.rounds):
        rounds.append(measure_round(options))
        print(report(options, rounds, 0.0, []), flush=True)
    usual, saves = measure_saves(options) if options.save_every else (0.0, [])
    text = report(options, rounds, usual, saves)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

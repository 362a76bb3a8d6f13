"""How fast is a training step under several layouts of the same GPUs? `python -m train`, layout after layout.

    python -m benchmarks.layouts CORPUS --processes 2 --output benchmarks/results/NAME.md

CORPUS is a prepared corpus; its text does not matter, only that there is enough. Every layout gives a rank equally many
tokens a step, so that tokens/s per GPU can be compared: replicas that read a sample each, and sequence ranks
(`parallel.sequence`) that share longer ones. Layouts are started in turn, --rounds times; a run is ended as soon as it
has --steps steps, so that no checkpoint is written. The first third of its steps does not count.
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
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train.callbacks.metrics_file import FILE_NAME, read_metrics  # noqa: E402

# A step more than a run is ever given time for.
ENDLESS = 1_000_000
CONFIGURATION = [
    "recipe=none",
    f"training.total_steps={ENDLESS}",
    "corpus.max_epochs=1000000",
    "evaluation=none",
    "checkpoint.interval=0",
    "logging.interval=1",
    "logging.monitor_interval=0",
    "logging.progress=false",
    "logging.wandb.mode=disabled",
]


@dataclass(frozen=True)
class Layout:
    """Samples of `length` tokens, `micro_batch_size` at once, each shared by `sequence` ranks."""

    sequence: int
    length: int
    micro_batch_size: int

    def settings(self, processes: int) -> list[str]:
        replicas = processes // self.sequence
        return [
            f"parallel.sequence={self.sequence}",
            f"training.sequence_length={self.length}",
            f"training.micro_batch_size={self.micro_batch_size}",
            f"training.global_batch_size={self.micro_batch_size * replicas}",
        ]

    def __str__(self) -> str:
        return f"sequence {self.sequence}, {self.micro_batch_size} x {self.length:,} tokens"


def layouts(processes: int, tokens: int) -> list[Layout]:
    """Those with `tokens` tokens a rank: no sequence ranks; all of them on one long sample; and on shorter ones."""
    return [
        Layout(1, tokens, 1),
        Layout(processes, tokens * processes, 1),
        Layout(processes, tokens // 2, 2 * processes),
    ]


def measure(layout: Layout, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The metrics of the steps of one run, oldest first. Raises RuntimeError where it ends by itself."""
    settings = [f"corpus.directory={options.corpus.resolve()}", *CONFIGURATION, *options.settings]
    settings += ["name=run", f"run_root={folder}", *layout.settings(options.processes)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
    with (folder / "output").open("w") as output:
        run = subprocess.Popen(
            [sys.executable, *launcher, "-m", "train", *settings],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            while True:
                ended = run.poll() is not None
                steps = [record for record in _records(folder / "run") if record.get("kind") == "train"]
                if len(steps) >= options.steps:
                    return steps[: options.steps]
                if ended:
                    raise RuntimeError(f"{layout}: {(folder / 'output').read_text()[-3000:]}")
                time.sleep(0.5)
        finally:
            # Asked to stop, it would write a checkpoint. The workers of torchrun have sessions of their own.
            for process in [*psutil.Process(run.pid).children(recursive=True), psutil.Process(run.pid)]:
                process.kill()
            run.wait()


def _records(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run) if (run / FILE_NAME).exists() else []


def report(options: argparse.Namespace, measured: dict[Layout, list[list[dict[str, Any]]]]) -> str:
    """The result file."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    counted = options.steps // 3
    rates = {
        layout: [statistics.median(step["tokens_per_second_per_gpu"] for step in steps[counted:]) for steps in rounds]
        for layout, rounds in measured.items()
    }
    first = next(iter(rates.values()))
    lines = [
        "# Layouts of a training step",
        "",
        f"- date: {datetime.date.today()}",
        f"- hardware: {options.processes} x {device}; torch {torch.__version__}",
        f"- commit: {commit.strip()}",
        f"- command: `python -m benchmarks.layouts {shlex.join(sys.argv[1:])}`",
        f"- steps {counted + 1} to {options.steps} of each run, {options.rounds} runs in turn",
        "",
        "| layout | tokens/s per GPU, median of each run | against the first, run by run | GiB a GPU |",
        "|---|---|---|---|",
    ]
    for layout, values in rates.items():
        ratios = ", ".join(f"{value / other:.3f}" for value, other in zip(values, first, strict=True))
        memory = max(step.get("memory_gib") or 0.0 for steps in measured[layout] for step in steps)
        lines.append(f"| {layout} | {', '.join(f'{value:,.0f}' for value in values)} | {ratios} | {memory:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens a rank and micro-batch")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("settings", nargs="*", help="of the runs, such as model=xlstm_1b4 parallel=zero1")
    options = parser.parse_intermixed_args()
    measured: dict[Layout, list[list[dict[str, Any]]]] = {}
    for _ in range(options.rounds):
        for layout in layouts(options.processes, options.tokens):
            with tempfile.TemporaryDirectory() as folder:
                measured.setdefault(layout, []).append(measure(layout, options, Path(folder)))
    text = report(options, measured)
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

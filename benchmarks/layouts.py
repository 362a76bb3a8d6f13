"""How fast is a training step under several layouts of the same GPUs? `python -m train`, layout after layout.

    python -m benchmarks.layouts CORPUS --processes 2 --compare sequence,zero --output benchmarks/results/NAME.md

CORPUS is a prepared corpus; its text does not matter, only that there is enough. Comparisons, each against its first
layout, with equally many tokens a rank and pass:

    sequence   replicas that read a sample each, and sequence ranks (`parallel.sequence`) that share longer ones
    context    sequence ranks on longer and longer samples, up to 8 times as many tokens a rank, recomputed where kept
               activations would not fit
    zero       replicas and sequence ranks under ZeRO 2 and 3
    pipeline   replicas and stages, with many micro-batches and with few long ones, whole and in time chunks

Layouts are started in turn, --rounds times; a run is ended as soon as it has its steps, so that no checkpoint is
written. The first third of them does not count.
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
from collections.abc import Sequence
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
    """A run and what it is compared with.

    Attributes:
        name: what the table says.
        settings: beside those of all runs.
        share: of the rate of the layout it is compared with, that is possible at best.
        against: that layout; None: this is one that others are compared with.
        steps: more or fewer of them than --steps says, as a factor.
    """

    name: str
    settings: tuple[str, ...]
    against: Layout | None = None
    share: float = 1.0
    steps: float = 1.0


def laid_out(sequence: int, length: int, micro_batch_size: int, processes: int, *more: str) -> tuple[str, ...]:
    """Settings of a run whose ranks take one micro-batch a step."""
    replicas = processes // sequence
    return (
        f"parallel.sequence={sequence}",
        f"training.sequence_length={length}",
        f"training.micro_batch_size={micro_batch_size}",
        f"training.global_batch_size={micro_batch_size * replicas}",
        *more,
    )


def compare_sequence(processes: int, tokens: int) -> list[Layout]:
    """No sequence ranks; all of them on one long sample; and on shorter ones."""
    replicas = Layout(f"replicas, 1 x {tokens:,} tokens", laid_out(1, tokens, 1, processes))
    long, short, several = tokens * processes, tokens // 2, 2 * processes
    return [
        replicas,
        Layout(f"sequence, 1 x {long:,} tokens", laid_out(processes, long, 1, processes), replicas),
        Layout(f"sequence, {several} x {short:,} tokens", laid_out(processes, short, several, processes), replicas),
    ]


def compare_context(processes: int, tokens: int) -> list[Layout]:
    """Longer and longer samples, with activations kept and with recomputation."""

    def sequence(factor: float, *more: str, against: Layout | None = None) -> Layout:
        length, several = int(tokens * processes * max(factor, 1.0)), max(1, round(1 / factor))
        name = f"sequence, {several} x {length // several:,} tokens{', recomputed' if more else ''}"
        settings = laid_out(processes, length // several, several, processes, *more)
        return Layout(name, settings, against, steps=min(1.0, 2 / factor))

    unit = "parallel.activation_checkpointing=unit"
    kept, again = sequence(1.0), sequence(1.0, unit)
    return [
        kept,
        sequence(0.25, against=kept),
        sequence(2.0, against=kept),
        again,
        sequence(8.0, unit, against=again),
    ]


def compare_zero(processes: int, tokens: int) -> list[Layout]:
    """Replicas, and sequence ranks on one sample, under the stages of ZeRO that cut gradients and weights."""
    found = []
    for stage in (2, 3):
        zero = f"parallel.zero_stage={stage}"
        replicas = Layout(f"ZeRO-{stage}, replicas", laid_out(1, tokens, 1, processes, zero))
        settings = laid_out(processes, tokens * processes, 1, processes, zero)
        found += [replicas, Layout(f"ZeRO-{stage}, sequence", settings, replicas)]
    return found


def compare_pipeline(processes: int, tokens: int) -> list[Layout]:
    """Stages with 8 micro-batches a step, and with 2 long ones, whole and in chunks; replicas that add up as many."""

    def layout(micro_batches: int, length: int, stages: int, chunks: int, against: Layout | None) -> Layout:
        settings = [f"training.sequence_length={length}", "training.micro_batch_size=1"]
        settings += [f"training.global_batch_size={micro_batches}", f"parallel.pipeline={stages}"]
        name = f"{micro_batches} x {length:,} tokens a step, " + (f"{stages} stages" if stages > 1 else "replicas")
        if chunks > 1:
            settings.append(f"training.time_chunk={length // chunks}")
            name += f", {chunks} time chunks"
        units = micro_batches * chunks
        share = units / (units + stages - 1)
        return Layout(name, tuple(settings), against, share, steps=tokens * processes / (micro_batches * length))

    short, long = layout(8, tokens // 2, 1, 1, None), layout(2, 2 * tokens, 1, 1, None)
    return [
        short,
        layout(8, tokens // 2, processes, 1, short),
        long,
        *(layout(2, 2 * tokens, processes, chunks, long) for chunks in (1, 2, 4)),
    ]


COMPARISONS = {
    "sequence": compare_sequence,
    "context": compare_context,
    "zero": compare_zero,
    "pipeline": compare_pipeline,
}


def measure(layout: Layout, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The metrics of the steps of one run, oldest first. Raises RuntimeError where it ends by itself."""
    settings = [f"corpus.directory={options.corpus.resolve()}", *CONFIGURATION, *options.settings, *layout.settings]
    return run_steps(settings, max(6, round(options.steps * layout.steps)), options.processes, folder)


def run_steps(settings: Sequence[str], wanted: int, processes: int, folder: Path) -> list[dict[str, Any]]:
    """The metrics of the first `wanted` steps of a run in `folder`/run, oldest first; there it is ended.

    `settings`: of a run that logs every step and goes on for longer. Raises RuntimeError where it ends by itself.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with (folder / "output").open("w") as output:
        run = subprocess.Popen(
            [sys.executable, *launcher, "-m", "train", "name=run", f"run_root={folder}", *settings],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            while True:
                ended = run.poll() is not None
                steps = [record for record in _records(folder / "run") if record.get("kind") == "train"]
                if len(steps) >= wanted:
                    return steps[:wanted]
                if ended:
                    raise RuntimeError(f"{' '.join(settings)}: {(folder / 'output').read_text()[-3000:]}")
                time.sleep(0.5)
        finally:
            # Asked to stop, it would write a checkpoint. The workers of torchrun have sessions of their own.
            if run.poll() is None:
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
    rates = {
        layout: [
            statistics.median(step["tokens_per_second_per_gpu"] for step in steps[len(steps) // 3 :])
            for steps in rounds
        ]
        for layout, rounds in measured.items()
    }
    lines = [
        "# Layouts of a training step",
        "",
        f"- date: {datetime.date.today()}",
        f"- hardware: {options.processes} x {device}; torch {torch.__version__}",
        f"- commit: {commit.strip()}",
        f"- command: `python -m benchmarks.layouts {shlex.join(sys.argv[1:])}`",
        f"- {options.rounds} runs of each layout, in turn; the first third of their steps does not count",
        "- ratios: to the last layout above that has none, run by run; of what its bubble allows, where it has one",
        "",
        "| layout | tokens/s per GPU, median of each run | ratio | of the possible | GiB a GPU |",
        "|---|---|---|---|---|",
    ]
    for layout, values in rates.items():
        ratios = possible = ""
        if layout.against is not None:
            pairs = list(zip(values, rates[layout.against], strict=False))
            ratios = ", ".join(f"{value / other:.3f}" for value, other in pairs)
            possible = ", ".join(f"{value / other / layout.share:.3f}" for value, other in pairs)
        memory = max((step.get("memory_gib") or 0.0 for steps in measured[layout] for step in steps), default=0.0)
        rate = ", ".join(f"{value:,.0f}" for value in values) or "did not run"
        lines.append(f"| {layout.name} | {rate} | {ratios} | {possible} | {memory:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--compare", default="sequence", help=f"of {', '.join(COMPARISONS)}, separated by commas")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens a rank and micro-batch")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("settings", nargs="*", help="of the runs, such as model=xlstm_1b4 parallel=zero1")
    options = parser.parse_intermixed_args()
    compared = [
        layout for name in options.compare.split(",") for layout in COMPARISONS[name](options.processes, options.tokens)
    ]
    measured: dict[Layout, list[list[dict[str, Any]]]] = {}
    for _ in range(options.rounds):
        for layout in compared:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    measured.setdefault(layout, []).append(measure(layout, options, Path(folder)))
                except RuntimeError as error:
                    # Of many layouts one may not fit; the others are measured all the same.
                    print(error, flush=True)
            text = report(options, measured)
            if options.output:
                options.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""Do a CPU and a GPU train the same model? `python -m train`, one configuration, the loss curves side by side.

    python benchmarks/first_steps.py prepare FOLDER                      # text -> FOLDER/corpus, under 3 MB
    python benchmarks/first_steps.py run FOLDER cpu_fp32 --precision fp32 --steps 12
    python benchmarks/first_steps.py run FOLDER gpu_bf16 --precision bf16 --steps 50
    python benchmarks/first_steps.py compare FOLDER --reference cpu_fp32

FOLDER may travel to another machine between two of these: `run` reads FOLDER/corpus and leaves the run's metrics.jsonl,
plan.json and environment.json in FOLDER/NAME. `compare` prints a table and ends with exit code 1 when a run leaves the
reference by more than the tolerance of its precision.

The model is xLSTM-160M with 8192 token ids: 99,426,192 parameters. The learning rate is constant after two steps, so
runs of different lengths agree in their common steps, and it is that of a warm-up under way: with 1e-3 from the third
step on, the gradient norm jumps by factors of two and rounding decides the curve (fp32 and bf16 part by 0.2 nats within
8 steps on one CPU).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from train.callbacks.metrics_file import read_metrics  # noqa: E402

VOCAB_SIZE = 8192
PREPARE = [
    "data=standard_library",
    'data.files=["[a-d]*.py"]',
    "tokenizer=sentencepiece_4k",
    f"tokenizer.vocab_size={VOCAB_SIZE}",
]
CONFIGURATION = [
    "model=xlstm_160m",
    f"model.vocab_size={VOCAB_SIZE}",
    "schedule=constant",
    "schedule.warmup=2",
    "optimizer.learning_rate=1e-4",
    "training.sequence_length=256",
    "training.global_batch_size=8",
    "training.micro_batch_size=4",
    "corpus.max_epochs=10",
    "evaluation=none",
    "checkpoint.interval=0",
    "logging.interval=1",
    "logging.monitor_interval=0",
    "logging.progress=false",
    "logging.wandb.mode=disabled",
]
# Nats per token by which the loss of one step may differ from that of the fp32 reference. bf16: products with 8 bits of
# mantissa, the tolerance of tests/train/test_layouts.py for 20 steps; fp32: another order of summation.
TOLERANCE = {"bf16": 2e-2, "fp32": 1e-3}


def prepare(folder: Path) -> int:
    """Tokenize a part of this Python's standard library into `folder`/corpus: the same bytes on the same Python."""
    command = [sys.executable, "-m", "data_pipeline", "prepare", *PREPARE, f"output={folder / 'corpus'}"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def run(folder: Path, name: str, precision: str, steps: int, overrides: list[str]) -> int:
    """Train `steps` steps in one process; keep what the comparison needs and drop the checkpoint of 1.2 GB."""
    with tempfile.TemporaryDirectory() as run_root:
        arguments = [f"name={name}", f"run_root={run_root}", f"corpus.directory={folder / 'corpus'}"]
        arguments += [*CONFIGURATION, f"precision={precision}", f"training.total_steps={steps}", *overrides]
        code = subprocess.run([sys.executable, "-m", "train", *arguments], cwd=ROOT, check=False).returncode
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in ("metrics.jsonl", "plan.json", "environment.json", "config.yaml", "code.json"):
            if (Path(run_root) / name / file).is_file():
                shutil.copy(Path(run_root) / name / file, folder / name)
    return code


def compare(folder: Path, reference: str) -> int:
    """Print every run beside `reference`, over the steps that both have; 1 when one leaves its tolerance."""
    expected = _curve(folder / reference)
    names = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl") if path.parent.name != reference)
    print(_describe(folder / reference, reference))
    outside = 0
    for name in names:
        got = _curve(folder / name)
        steps = sorted(expected.keys() & got.keys())
        differences = {step: got[step]["loss"] - expected[step]["loss"] for step in steps}
        worst = max(map(abs, differences.values()), default=math.inf)
        tolerance = TOLERANCE[_precision(folder / name)]
        verdict = "within" if worst <= tolerance else "OUTSIDE"
        outside += worst > tolerance
        print(f"\n{_describe(folder / name, name)}\n")
        print(f"| step | loss, {reference} | loss, {name} | difference | grad_norm, {reference} | grad_norm, {name} |")
        print("|---|---|---|---|---|---|")
        for step in steps:
            mine, theirs = got[step], expected[step]
            print(
                f"| {step} | {theirs['loss']:.5f} | {mine['loss']:.5f} | {differences[step]:+.2e} "
                f"| {theirs['grad_norm']:.4f} | {mine['grad_norm']:.4f} |"
            )
        last = got[max(got)]
        print(
            f"\nLargest difference over {len(steps)} steps: {worst:.2e} nats per token, {verdict} the tolerance "
            f"{tolerance:g}. Last step {max(got)}: loss {last['loss']:.4f}, {last['tokens_per_second']:,.0f} tokens/s, "
            f"{last['memory_gib']:.2f} GiB."
        )
    return 1 if outside or not names else 0


def _curve(run_directory: Path) -> dict[int, dict]:
    return {line["step"]: line for line in read_metrics(run_directory) if line["kind"] == "train"}


def _precision(run_directory: Path) -> str:
    command = json.loads((run_directory / "environment.json").read_text(encoding="utf-8"))["command"]
    return next(part for part in command if part.startswith("precision=")).removeprefix("precision=")


def _describe(run_directory: Path, name: str) -> str:
    """Hardware, versions, commit and command of a run, as the CONTRIBUTING page asks of a result."""
    environment = json.loads((run_directory / "environment.json").read_text(encoding="utf-8"))
    plan = json.loads((run_directory / "plan.json").read_text(encoding="utf-8"))
    code = json.loads((run_directory / "code.json").read_text(encoding="utf-8"))
    packages = ", ".join(f"{key} {value}" for key, value in environment["packages"].items() if value)
    return (
        f"`{name}`: {plan['device']}, {environment['cpu_count']} cores, Python {environment['python']}, {packages}; "
        f"{plan['parameters']:,} parameters; commit {code['revision']}; `{' '.join(environment['command'][1:])}`"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("prepare", "run", "compare"):
        commands.add_parser(command).add_argument("folder", type=Path)
    runner = commands.choices["run"]
    runner.add_argument("name")
    runner.add_argument("--precision", choices=sorted(TOLERANCE), required=True)
    runner.add_argument("--steps", type=int, default=12)
    runner.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides of the run")
    commands.choices["compare"].add_argument("--reference", default="cpu_fp32")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.command == "prepare":
        return prepare(folder)
    if options.command == "run":
        return run(folder, options.name, options.precision, options.steps, options.set)
    return compare(folder, options.reference)


if __name__ == "__main__":
    sys.exit(main())

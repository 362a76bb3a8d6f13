"""`make demo`: prepare real text, train a small xLSTM on it, score it against n-grams, write a sample and a report.

The text is the running interpreter's own standard library, so nothing is downloaded. Every stage picks up where an
interrupted one stopped, and a finished demo only says so.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from conf import compose
from launch.local import default_processes, train_locally
from train.callbacks.metrics_file import read_metrics
from train.command import Command
from train.config import RunConfig
from train.ngram_baselines import write_baselines
from train.report import draw_report
from train.run_directory import RunDirectory, read_events, write_atomically

PROMPT = "    def __init__(self, name):\n"
SAMPLE_TOKENS = 120
# Nats per token by which the model must beat both n-gram models for the demo to count as a success.
CLEAR_MARGIN = 0.15


def run_demo(overrides: Sequence[str] = ()) -> int:
    """Run the demo with Hydra `overrides` of its experiment.

    Returns 0 when the model was trained and beats both n-gram models clearly, else 1; 2 for a faulty configuration.
    """
    overrides = ["experiment=demo", *overrides]
    config = compose(RunConfig, "train", overrides)
    directory = RunDirectory(Path(config.run_root) / config.name)
    corpus = config.corpus.directory

    _say("1/4  Text, tokenizer and shards")
    prepare = ["data=standard_library", "tokenizer=sentencepiece_4k", f"output={corpus}"]
    if code := subprocess.run([sys.executable, "-m", "data_pipeline", "prepare", *prepare], check=False).returncode:
        return code
    directory.create()
    baselines = write_baselines(config, directory.baselines)

    _say("2/4  Training")
    if code := train_locally(Command(overrides), default_processes()):
        return code
    held_out = _final_held_out_loss(directory.path)
    if held_out is None:
        _say("The run was stopped before its end; `make demo` continues it.")
        return 1

    _say("3/4  A sample")
    sample = _generate(directory)
    print(sample)
    write_atomically(directory.path / "sample.txt", sample)

    _say("4/4  Report")
    report = draw_report(directory.path)
    return _conclude(held_out, baselines, report)


def _say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def _final_held_out_loss(run_directory: Path) -> float | None:
    """The last held-out loss, in nats per token; None when the run has not ended."""
    ends = [event for event in read_events(run_directory) if event["event"] in ("complete", "stop")]
    if not ends or ends[-1]["event"] == "stop":
        return None
    step = ends[-1]["step"]
    final = [line for line in read_metrics(run_directory) if line["kind"] == "evaluation" and line["step"] == step]
    return final[-1]["loss"] if final else None


def _generate(directory: RunDirectory) -> str:
    arguments = [f"checkpoint={directory.path}", f"prompt={PROMPT}", f"max_new_tokens={SAMPLE_TOKENS}"]
    command = [sys.executable, "-m", "model", "generate", *arguments, "temperature=0.6", "seed=1"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8").stdout


def _conclude(held_out: float, baselines: dict, report: Path) -> int:
    unigram, bigram = baselines["unigram"]["loss"], baselines["bigram"]["loss"]
    print("Held-out loss on the same tokens, nats per token:")
    print(f"  unigram              {unigram:.3f}")
    print(f"  bigram, add-k        {bigram:.3f}")
    print(f"  this xLSTM           {held_out:.3f}")
    print(f"Report: {report}")
    if held_out > min(unigram, bigram) - CLEAR_MARGIN:
        print(f"The model does not beat both n-gram models by {CLEAR_MARGIN} nats.", file=sys.stderr)
        return 1
    return 0

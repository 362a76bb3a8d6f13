"""The suite of synthetic tasks, and the command that runs it: what it scores, where it writes, what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

from conf import compose
from data_pipeline.reading.batch import MASKED
from tests.runs import PATIENCE, ROOT, environment, run_train, train_command
from tests.train.wandb_files import records
from train.callbacks.metrics_file import read_metrics
from train.config import RunConfig
from train.evaluate.__main__ import main
from train.evaluate.suites.base import CaseResult, SuiteResult, SuiteSettings
from train.evaluate.suites.results import append_result, newest_results, read_results, result_line
from train.evaluate.suites.suites import all_suites, suite_named, suite_names
from train.evaluate.suites.task import scores
from train.validate import validate

# An sLSTM that learns parity in seconds, on examples of up to 12 words.
SHORT_PARITY = [
    "experiment=parity",
    "model.d_model=32",
    "training.sequence_length=12",
    "training.global_batch_size=64",
    "optimizer.learning_rate=1e-2",
    "training.total_steps=120",
    "logging.interval=30",
    "logging.progress=false",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    done = run_train([*SHORT_PARITY, f"run_root={root}"])
    assert done.returncode == 0, done.stderr
    return root / "parity"


def test_an_slstm_learns_parity_and_carries_it_beyond_the_trained_length(run, capsys):
    arguments = ["suite=task", "suite.lengths=[12,40]", "suite.examples=200"]
    assert main([str(run), *arguments]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["case", "accuracy", "loss", "chance", "scaled", "examples"]
    assert printed[1].startswith("parity/12") and printed[-1] == f"appended to {run / 'evaluations.jsonl'}"
    (line,) = read_results(run / "evaluations.jsonl")
    assert (line["suite"], line["step"], line["trained_tokens"]) == ("task", 120, 120 * 64 * 12)
    assert line["settings"]["lengths"] == [12, 40] and line["settings"]["scored"] == "answer"
    found = line["results"]
    assert found["parity/12"]["accuracy"] >= 0.99 and found["parity/40"]["accuracy"] >= 0.95
    assert found["parity/12"]["scaled_accuracy"] == pytest.approx(2 * found["parity/12"]["accuracy"] - 1)
    # Of the same model at the same examples, the same.
    assert main([str(run), *arguments]) == 0
    again = read_results(run / "evaluations.jsonl")
    assert (
        len(again) == 2
        and again[1]["results"] == found
        and newest_results(run / "evaluations.jsonl")["task"] == again[1]
    )
    losses = [record["loss"] for record in read_metrics(run) if record["kind"] == "train"]
    assert losses[0] > 0.1 and losses[-1] < 0.05


def test_a_run_goes_on_with_the_next_example(run, tmp_path):
    """Stopped after 100 steps and started again it has the losses of the run that was never stopped."""
    shortened = [*SHORT_PARITY, f"run_root={tmp_path}", "schedule=constant"]
    for steps in (4, 8):
        done = run_train([*shortened, f"training.total_steps={steps}", "logging.interval=1"])
        assert done.returncode == 0, done.stderr
    done = run_train([*shortened, "name=whole", "training.total_steps=8", "logging.interval=1"])
    assert done.returncode == 0, done.stderr
    stopped, whole = (
        [record["loss"] for record in read_metrics(tmp_path / name) if record["kind"] == "train"]
        for name in ("parity", "whole")
    )
    assert stopped == whole and len(whole) == 8
    refused = run_train([*shortened, "corpus.task.name=even_pairs", "training.total_steps=9"])
    assert refused.returncode == 2, refused.stderr
    assert "corpus.task.name: even_pairs gives other data than parity gave" in refused.stderr


def test_what_a_task_has_no_use_for_is_refused():
    many = ["corpus.packing=best_fit", "corpus.split=test", "evaluation=validation", "training.carry_state=true"]
    config = compose(RunConfig, "train", ["experiment=parity", *many])
    keys = [problem.split(":")[0] for problem in validate(config, 1)]
    for key in ("corpus.packing", "corpus.split", "evaluation.sets.validation", "training.carry_state"):
        assert key in keys, keys
    both = compose(RunConfig, "train", ["experiment=parity", "corpus.directory=x"])
    (problem,) = [line for line in validate(both, 1) if line.startswith("corpus.directory: ")]
    assert "set exactly one of corpus.directory (x), corpus.live and corpus.task, the others to null" in problem


def test_what_was_found_stands_in_the_summary_at_wandb(run, tmp_path):
    assert not (run / "wandb").exists() and not (run / "evaluations").exists()
    (run / "wandb_id.txt").write_text("abcd1234\n")
    command = [str(run), "suite=task", "suite.lengths=[12]", "suite.examples=20", "logging.wandb.mode=offline"]
    done = subprocess.run(
        train_command([*command, "--output", str(tmp_path / "found.jsonl")], module="train.evaluate"),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    (run / "wandb_id.txt").unlink()
    assert done.returncode == 0, done.stderr
    (line,) = read_results(tmp_path / "found.jsonl")
    (file,) = (run / "wandb").glob("offline-run-*-abcd1234/run-abcd1234.wandb")
    sent = {}
    for one in records(file):
        if one.WhichOneof("record_type") == "summary":
            sent |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in one.summary.update}
    assert sent["suite/task/parity/12/accuracy"] == line["results"]["parity/12"]["accuracy"]
    assert sent["suite/task/step"] == 120


def test_scores_count_words_and_whole_examples():
    logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0]], [[0.0, 3.0], [0.0, 1.0]]])
    targets = torch.tensor([[1, 1], [MASKED, 1]])
    right, words, whole, loss = scores(logits, targets).tolist()
    assert (right, words, whole) == (2, 3, 1)
    expected = math.log1p(math.exp(-1)) + math.log1p(math.exp(2)) + math.log1p(math.exp(-1))
    assert loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["suite=tasks"], "suite=tasks: conf/suite/ has no such file (did you mean 'task'?); choose one of "),
        (["suite=task", "suite.lengths=[]"], "suite.lengths: there is none; give one, such as [40]"),
        (["suite=task", "suite.examples=0"], "suite.examples: must be at least 1 (0)"),
        (["suite=task", "suite.size=1"], "suite.size: no such key"),
        (["suite=task", "suite.kind=other"], "suite.kind: conf/suite/task.yaml is of kind task; set suite=NAME"),
        (["suite=task", "+suite.task.name=s3"], "the model was trained with another tokenizer than the words of s3"),
        (["suite=task", "+suite.task.name=party"], "suite.task.name: no such task ('party') (did you mean 'parity'?)"),
        (["suite=task", "suite=task"], "suite: name one at a time, not task and task"),
        (["suite=task", "model.d_model=3"], "model.d_model=3: suites do not read it"),
        (["suite=task", "evaluation.batch_size=3"], "evaluation.batch_size=3: suites do not read it; leave it out"),
    ],
)
def test_what_cannot_be_scored_ends_with_2_and_writes_nothing(run, arguments, message, capsys):
    before = (run / "evaluations.jsonl").read_bytes() if (run / "evaluations.jsonl").is_file() else None
    assert main([str(run), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert before == ((run / "evaluations.jsonl").read_bytes() if before is not None else None)


def test_every_file_of_the_group_is_of_a_known_kind_and_every_kind_has_a_file():
    kinds = {name: suite_named(name).kind for name in suite_names()}
    assert set(kinds.values()) == {suite.kind for suite in all_suites()}


def test_results_survive_a_kill_and_are_refused_in_a_later_format(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    result = SuiteResult({"a/1": CaseResult({"accuracy": 0.75, "loss": math.inf}, 4, 0.5)}, ["as it is"])
    append_result(path, result_line("task", SuiteSettings("task"), result, model="m", step=1))
    path.write_bytes(path.read_bytes() + b'{"suite": "ta')
    append_result(path, result_line("task", SuiteSettings("task"), result, model="m", step=2))
    lines = read_results(path)
    assert [line["step"] for line in lines] == [1, 2] and json.loads(path.read_text().splitlines()[0])[
        "kind"
    ] == "header"
    expected = {"accuracy": 0.75, "loss": None, "examples": 4, "chance": 0.5, "scaled_accuracy": 0.5}
    assert lines[0]["results"] == {"a/1": expected} and lines[0]["notes"] == ["as it is"]
    path.write_text('{"kind": "header", "format_version": 2}\n')
    with pytest.raises(
        ValueError, match="has format_version 2; this version of xlstm-pretrain reads 1; a later version"
    ):
        append_result(path, lines[0])

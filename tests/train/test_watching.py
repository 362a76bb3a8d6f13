"""CSV tables, TensorBoard's event files, samples: one curve through rollbacks and resumes, no change of the run."""

import csv
import json

import pytest
import torch

from conf import ConfigError, compose
from tests.runs import TINY_RUN, run_train
from tests.train.plain_runs import figures, run_plainly
from train.callbacks.base import Callback
from train.callbacks.csv_tables import CsvTables
from train.callbacks.metrics_file import read_metrics
from train.callbacks.tensorboard_logger import TensorBoardLogger
from train.checkpoints.generators import generator_states
from train.config import RunConfig
from train.decisions import CONTINUE, Rollback
from train.requirements import open_requirements
from train.run import make_callbacks
from train.run_directory import read_lines
from train.validate import validate

STEPS = 8
WATCHED = [
    "logging.csv=true",
    "logging.tensorboard=true",
    "logging.samples.interval=2",
    "logging.samples.prompts=['', 'ab c']",
    "logging.samples.max_new_tokens=6",
]
ATTENTION = ["model.attention_at=[2]"]


class Watcher(Callback):
    """Goes back behind step 6 to step 4 once; keeps the generators' states and the samples that it is told of."""

    def __init__(self, goes_back=True):
        self.goes_back = goes_back
        self.generators, self.told = {}, []

    def on_step_start(self, trainer):
        self.generators[trainer.step] = generator_states(trainer.device)

    def on_step_end(self, trainer):
        if trainer.step == 6 and self.goes_back:
            self.goes_back = False
            return Rollback(step=4, skip=1, reason="a test")
        return CONTINUE

    def on_samples(self, trainer, samples):
        self.told.append((trainer.step, list(samples)))


@pytest.fixture(scope="module")
def base(small_corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("watching")
    settings = [f"training.total_steps={STEPS}", "checkpoint.interval=2", "parallel=zero0"]
    settings += ["logging.monitor_interval=4", "evaluation.interval=4"]
    return root, [f"run_root={root}", f"corpus.directory={small_corpus}", *TINY_RUN, *settings]


@pytest.fixture(scope="module")
def watched(base):
    """(folder of a run that went back and was then resumed with everything on, folder without, both callbacks)."""
    root, overrides = base
    with_samples, without = Watcher(), Watcher()
    assert run_plainly(["name=watched", *overrides, *WATCHED], [with_samples]) == 0
    assert run_plainly(["name=plain", *overrides], [without]) == 0
    # Extended: it resumes.
    longer = f"training.total_steps={STEPS + 2}"
    assert run_plainly(["name=watched", *overrides, *WATCHED, longer]) == 0
    return root / "watched", root / "plain", with_samples, without


def rows(folder, name):
    with (folder / "csv" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_samples_change_no_bit_of_a_run(watched):
    folder, plain, with_samples, without = watched
    until = [line for line in figures(folder) if line[0] < STEPS]
    assert until == [line for line in figures(plain) if line[0] < STEPS]
    assert with_samples.generators == without.generators and len(without.generators) == STEPS


def test_samples_are_kept_once_a_step_and_told_to_callbacks(watched):
    folder, _, callback, _ = watched
    header, *lines = read_lines(folder / "samples.jsonl")
    assert header == {"kind": "header", "format_version": 1, "step": 0}
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (step, prompt) for step in range(2, STEPS + 3, 2) for prompt in ("", "ab c")
    ]
    # A model may end a text at once.
    assert any(line["text"] for line in lines) and all(set(line) == {"step", "prompt", "text"} for line in lines)
    # Step 6 came twice, with other weights each time.
    assert [step for step, _ in callback.told] == [2, 4, 6, 6, 8]
    told = {step: [vars(sample) for sample in samples] for step, samples in callback.told}
    for step in (2, 4, 6, 8):
        assert told[step] == [{k: line[k] for k in ("prompt", "text")} for line in lines if line["step"] == step]


def test_tables_hold_what_metrics_say_once_a_step(watched):
    folder = watched[0]
    lines = {kind: [line for line in read_metrics(folder) if line["kind"] == kind] for kind in
             ("train", "evaluation", "statistics")}  # fmt: skip
    train = rows(folder, "train")
    assert [int(row["step"]) for row in train] == list(range(1, STEPS + 3))
    for row, line in zip(train, lines["train"], strict=True):
        assert float(row["loss"]) == line["loss"] and set(row) == set(line) - {"kind"}
        assert row["mfu_exact"] == "", "not known is an empty field"
    evaluations = rows(folder, "evaluation")
    assert [(int(row["step"]), row["set"], float(row["loss"])) for row in evaluations] == [
        (line["step"], line["set"], line["loss"]) for line in lines["evaluation"]
    ]
    assert {(int(row["step"]), row["name"]): float(row["value"]) for row in rows(folder, "statistics")} == {
        (line["step"], name): value for line in lines["statistics"] for name, value in line["values"].items()
    }
    assert len(lines["statistics"]) == 2


def test_a_table_takes_up_figures_that_an_earlier_version_did_not_write(watched, tmp_path):
    class Run:
        is_main, run_directory = True, tmp_path

    lines = [{"kind": "header", "format_version": 1, "step": 0}, {"kind": "train", "step": 1, "tokens": 8, "loss": 2.0}]
    tables = CsvTables()

    def write():
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    write()
    tables.on_run_start(Run)
    lines.append({"kind": "train", "step": 2, "tokens": 16, "loss": float("inf"), "new": "a, b"})
    lines[-1]["loss"] = None
    write()
    tables.on_metrics(Run, {"step": 2, "tokens": 16, "loss": float("inf"), "new": "a, b"})
    tables.on_metrics(Run, {"step": 3, "tokens": 24, "loss": float("nan"), "new": 4})
    assert (tmp_path / "csv" / "train.csv").read_text() == 'step,tokens,loss,new\n1,8,2.0,\n2,16,,"a, b"\n3,24,,4\n'


def test_tensorboard_shows_one_curve_and_the_samples(watched):
    # Of the two readers in the package, the one behind the pages in the browser.
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    folder = watched[0]
    events = EventAccumulator(str(folder / "tensorboard"), {"tensors": 0})
    events.Reload()
    losses = events.Tensors("train/loss")
    lines = [line for line in read_metrics(folder) if line["kind"] == "train"]
    assert [event.step for event in losses] == list(range(1, STEPS + 3))
    values = [float(make_ndarray(event.tensor_proto)) for event in losses]
    assert values == pytest.approx([line["loss"] for line in lines], rel=1e-6)
    tags = events.Tags()["tensors"]
    assert {"evaluation/validation/loss", "train/grad_norm"} <= set(tags)
    assert any(tag.startswith("statistics/blocks.00") for tag in tags)
    assert "train/mfu_6n" not in tags, "not known is not logged"
    texts = events.Tensors("samples/1/text_summary")
    assert [event.step for event in texts] == list(range(2, STEPS + 3, 2))
    assert texts[0].tensor_proto.string_val[0].decode().startswith("    ab c")


def test_only_rank_0_writes(tmp_path):
    class Other:
        is_main, run_directory, step = False, tmp_path, 0

    for callback in (CsvTables(), TensorBoardLogger()):
        callback.on_run_start(Other)
        callback.on_metrics(Other, {"step": 1, "loss": 1.0})
        callback.on_rollback(Other, Rollback(step=0, skip=0), 1)
        callback.on_run_end(Other, "complete")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_asked_for_is_not_there():
    names = {type(callback).__name__ for callback in make_callbacks(RunConfig(name="unit"))}
    assert not names & {"CsvTables", "TensorBoardLogger", "Samples"}


def test_problems_of_samples_are_named_with_their_keys(base):
    wrong = ["interval=-1", "prompts=[]", "max_new_tokens=0", "temperature=-1", "top_k=0", "top_p=0"]
    config = compose(RunConfig, "train", ["name=x", *base[1], *(f"logging.samples.{value}" for value in wrong)])
    assert [problem for problem in validate(config, 1) if "samples" in problem] == [
        "logging.samples.interval: must be at least 0 (-1)",
        'logging.samples.prompts: there is none; give a text, or [""] to begin a document',
        "logging.samples.max_new_tokens: must be at least 1, not 0",
        "logging.samples.temperature: must be 0 (most likely token) or positive, not -1.0",
        "logging.samples.top_k: must be at least 1 or null, not 0",
        "logging.samples.top_p: must be above 0 and at most 1, not 0.0",
    ]


def test_tensorboard_without_its_package_is_refused_before_the_run(base, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = compose(RunConfig, "train", ["name=new", *base[1], "logging.tensorboard=true"])
    with pytest.raises(ConfigError, match=r"pip install 'xlstm-pretrain\[tensorboard\]'"):
        open_requirements(config, 1)
    assert not (base[0] / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["parallel=zero3", "precision=bf16"], ["parallel=zero2", "precision=bf16"]])
def test_samples_of_two_ranks_change_no_bit_under_any_layout(base, layout):
    """Where weights are cut (ZeRO-3), rank 0 gathers a copy."""
    root, overrides = base
    settings = [*overrides, "training.total_steps=4", *layout]
    name = layout[0].replace("=", "_")
    sampled = run_train([f"name={name}", *settings, *WATCHED[2:]], processes=2)
    assert sampled.returncode == 0, sampled.stderr
    assert run_train([f"name={name}_without", *settings], processes=2).returncode == 0
    assert figures(root / name) == figures(root / f"{name}_without")
    lines = read_lines(root / name / "samples.jsonl")[1:]
    assert [line["step"] for line in lines] == [2, 2, 4, 4]
    from model.loading import load
    from train.callbacks.samples import write_samples

    config = compose(RunConfig, "train", [f"name={name}", *settings, *WATCHED])
    from data_pipeline.tokenizing.tokenizer import Tokenizer

    model = load(root / name / "checkpoints" / "step-00000004", dtype=torch.bfloat16)
    again = write_samples(model, Tokenizer.load(root / name / "tokenizer"), config.logging.samples)
    assert [sample.text for sample in again] == [line["text"] for line in lines[2:]]

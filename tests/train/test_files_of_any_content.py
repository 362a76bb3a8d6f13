"""Runs whose files hold anything, or are another kind of thing: what is wrong is said, or done without."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from conf import ConfigError, compose
from data_pipeline.__main__ import main as data_main
from model.__main__ import main as model_main
from tests.train.plain_runs import copied_run, run_plainly, saved_run
from train.callbacks.metrics_file import read_metrics
from train.checkpoint import main as checkpoint_main
from train.config import RunConfig
from train.report import main as report_main
from train.requirements import open_requirements
from train.run_directory import read_events, read_lines
from train.watch.ends import End


@pytest.fixture(scope="module")
def base(small_corpus, tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("any"), small_corpus, "schedule=constant", "training.total_steps=2")


@pytest.fixture
def run(base, tmp_path):
    """(a copy of a run of two checkpoints, what starts it)"""
    return copied_run(base, tmp_path)


def replace_by(kind: str, path: Path, outside: Path) -> None:
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        outside.write_text("of another")
        path.symlink_to(outside)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.mark.parametrize("name", ["events.jsonl", "run.lock", "checkpoints.lock", "logs/rank-00000.log"])
@pytest.mark.parametrize("kind", ["pipe", "link", "device", "folder"])
def test_what_a_run_goes_on_writing_to_is_a_file_of_its_own(name, kind, run, tmp_path):
    folder, overrides = run
    replace_by(kind, folder / name, tmp_path / "outside")
    with pytest.raises(ConfigError, match=rf"a file is '{Path(name).name}', (which is a |a link out of its folder)"):
        open_requirements(compose(RunConfig, "train", [*overrides, "training.total_steps=3"]), 1)
    if kind == "link":
        assert (tmp_path / "outside").read_text() == "of another"


def test_a_start_that_cannot_have_the_lock_says_so_and_leaves_an_event(run, capfd):
    folder, overrides = run
    (folder / "run.lock").unlink()
    (folder / "run.lock").symlink_to("run.lock")
    assert run_plainly([*overrides, "training.total_steps=3"]) == 1
    assert "Too many levels of symbolic links" in capfd.readouterr().err
    error = read_events(folder)[-1]
    assert (error["event"], error["kind"], error["attempt"]) == ("error", "error", "")


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "plan.json", "code.json"])
def test_what_is_written_anew_takes_the_place_of_a_link(name, run, tmp_path):
    folder, overrides = run
    (folder / name).touch()
    replace_by("link", folder / name, tmp_path / "outside")
    assert run_plainly([*overrides, "training.total_steps=3", "logging.samples.interval=1"]) == 0
    assert (tmp_path / "outside").read_text() == "of another"
    assert not (folder / name).is_symlink()


def test_keeping_a_checkpoint_writes_through_no_link(run, tmp_path, capsys):
    folder, _ = run
    (tmp_path / "outside").write_text("of another")
    (folder / "checkpoints" / "step-00000001" / "kept.json").symlink_to(tmp_path / "outside")
    assert checkpoint_main(["keep", f"{folder}@1"]) == 0
    assert (tmp_path / "outside").read_text() == "of another"
    (folder / "checkpoints.lock").unlink(missing_ok=True)
    os.mkfifo(folder / "checkpoints.lock")
    assert checkpoint_main(["keep", f"{folder}@1"]) == 2
    assert "a file is 'checkpoints.lock', which is a named pipe" in capsys.readouterr().err


LINES = [
    {"kind": "train", "step": 1},
    {"kind": "train", "step": -1, "tokens": 1},
    {"kind": "train", "step": 10**400, "tokens": 1},
    {"kind": "train", "step": 1, "tokens": "7"},
    {"kind": "train", "step": 1, "tokens": 7, "loss": [1]},
    {"kind": "train", "step": 1, "tokens": 7, "loss": 10**400},
    {"kind": "train", "step": True, "tokens": 7},
    {"kind": "evaluation", "step": 1, "loss": 1.0},
    {"kind": "evaluation", "step": 1, "set": "validation"},
    {"kind": "evaluation", "step": 1, "set": ["x"], "loss": 1.0},
    {"kind": "statistics", "step": 1},
    {"kind": "statistics", "step": 1, "values": [1]},
    {"kind": "statistics", "step": 1, "values": {"blocks.0.x": "1"}},
]


def test_lines_of_metrics_that_are_no_measurement_are_passed_over(run, capsys):
    folder, overrides = run
    measured = read_metrics(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in LINES)
        file.write('{"kind": "train", "step": ' + "9" * 5000 + "}\n")
    assert read_metrics(folder) == measured
    assert report_main([str(folder)]) == 0 and model_main(["describe", str(folder)]) == 0
    assert run_plainly([*overrides, "training.total_steps=3", "logging.csv=true"]) == 0
    assert {line["step"] for line in read_metrics(folder) if line["kind"] == "train"} == {1, 2, 3}


def test_statistics_of_odd_names_are_not_drawn(run):
    folder, _ = run
    with (folder / "metrics.jsonl").open("a") as file:
        values = {name: 1.0 for name in ("blocks", "blocks.", "blocks.x", "blocks.0", "blocks.x.y", "blocks.0.y", "")}
        file.write(json.dumps({"kind": "statistics", "step": 2, "values": values}) + "\n")
    assert report_main([str(folder)]) == 0


@pytest.mark.parametrize("content", ["[1]", "x", "[" * 100_000, "\0"])
def test_baselines_that_cannot_be_read_are_named(content, run, capsys):
    (run[0] / "baselines.json").write_text(content)
    assert report_main([str(run[0])]) == 2
    assert "baselines.json cannot be read" in capsys.readouterr().err


def test_baselines_of_other_values_are_not_drawn(run):
    (run[0] / "baselines.json").write_text('{"format_version": 1, "unigram": {"loss": "x"}, "bigram": [1]}')
    assert report_main([str(run[0])]) == 0


@pytest.mark.parametrize("content", ["[1]", '{"total_steps": "x"}', "[" * 100_000, ""])
def test_a_run_without_a_plan_that_can_be_read_is_described(content, run, capsys):
    (run[0] / "plan.json").write_text(content)
    assert model_main(["describe", str(run[0])]) == 0
    assert "2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "name: run\nmodel: {}\ncorpus: 7", "a: 2001-99-99", "name: [1]", "corpus: 1\nseed: 0"]
)
def test_a_configuration_that_is_none_is_named_by_every_command(content, run, small_corpus, capsys):
    (run[0] / "config.yaml").write_text(content)
    assert model_main(["describe", str(run[0])]) == 2
    assert data_main(["inspect", str(small_corpus), "--sample", "1", "--run", str(run[0])]) == 2
    said = capsys.readouterr().err
    assert said.count("config.yaml") >= 2 and "Traceback" not in said


def test_a_damaged_copy_of_the_tokenizer_is_made_again(run):
    folder, overrides = run
    model = folder / "tokenizer" / "tokenizer.model"
    whole = model.read_bytes()
    model.write_bytes(whole[:100])
    assert run_plainly([*overrides, "training.total_steps=3"]) == 0
    assert model.read_bytes() == whole


def test_the_end_of_a_rank_with_values_of_other_types_is_left_out():
    end = End("a", 0, 1, "host", 1.5, "error", "words", "", "")
    whole = json.loads(end.as_json())
    assert End.from_json(whole) == end
    for change in ({"ended": "now"}, {"rank": None}, {"because_of": "x"}, {"new": 1}):
        assert End.from_json(whole | change) is None


def test_a_line_with_a_number_that_python_does_not_read_is_passed_over(tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n{"a": ' + "9" * 5000 + "}\n")
    assert read_lines(tmp_path / "lines.jsonl") == [{"a": 1}]

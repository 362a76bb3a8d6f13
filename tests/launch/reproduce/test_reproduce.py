"""Reproductions: planned, trained, scored, and put beside what is published."""

from __future__ import annotations

import json

import pytest

from launch.__main__ import main
from launch.reproduce.plan import folder_of, read_reproduction, trials_of
from launch.reproduce.published import PUBLISHED, PublishedResult
from launch.reproduce.table import as_text, cells
from launch.sweep.manifest import read_manifest
from tests.runs import ROOT
from train.evaluate.suites.results import read_results

# One model, two steps.
TINY = [
    "reproduce.only_models=[llama]",
    "reproduce.steps=2",
    "training.global_batch_size=8",
    "training.micro_batch_size=8",
    "model.d_model=16",
    'reproduce.tasks.parity.suite=["suite.lengths=[4,8]","suite.examples=16"]',
]


@pytest.mark.slow
def test_a_reproduction_trains_scores_and_ends_with_one_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = ["reproduce", "parity", *TINY]
    assert main([*command, "--plan"]) == 0
    folder = tmp_path / "reproductions" / "parity"
    rows = read_manifest(folder_of(read_reproduction("parity", TINY)[0])).rows
    assert [row.name for row in rows] == ["llama-parity-0.003-s0"]
    assert main([*command, "--no-training"]) == 1
    assert "llama-parity-0.003-s0: waiting, 0 of 2 steps" in capsys.readouterr().err
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "1 of 1 runs scored" in printed.err
    page = (folder / "reproduction.html").read_text()
    for text in ("Llama", "at 4", "at 8", "arXiv 2405.04517, section 4.1", 'class="as-published"'):
        assert text in page
    assert "http" not in page and page.count("<tr") == 2
    table = json.loads((folder / "reproduction.json").read_text())["table"]
    assert [cell["verdict"] for cell in table] == ["as published"]
    # Again: nothing is trained, and nothing scored, a second time.
    assert main(command) == 0
    assert len(read_results(folder / "runs" / rows[0].name / "evaluations.jsonl")) == 1
    assert main([*command, "reproduce.seeds=[1]"]) == 2
    assert "was planned otherwise; give this reproduction another reproduce.name=..." in capsys.readouterr().err


@pytest.mark.long
def test_parity_as_it_is_published(tmp_path, monkeypatch):
    """An sLSTM reads parity rightly at every length to 256, mLSTM and attention do not: minutes on two cores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main(["reproduce", "parity"]) == 0
    table = json.loads((tmp_path / "reproductions" / "parity" / "reproduction.json").read_text())["table"]
    of_model = {cell["model"]: cell for cell in table}
    assert of_model["xlstm_0_1"]["accuracies"] == dict.fromkeys([f"parity/{n}" for n in (40, 64, 128, 256)], 1.0)
    for model in ("xlstm_1_0", "llama"):
        assert all(0.4 < accuracy < 0.6 for accuracy in list(of_model[model]["accuracies"].values())[1:])
    assert all(cell["verdict"] == "as published" for cell in table)


@pytest.mark.parametrize(("name", "count"), [("formal", 4 * 16 * 3 * 2), ("mqar", 4 * 11 * 4), ("parity", 3)])
def test_every_run_of_the_shipped_reproductions_is_planned(name, count):
    """Of formal and mqar only the first rate and seed: the others are the same run with another number."""
    config, machines, further = read_reproduction(name, [])
    assert machines.nodes == machines.gpus_per_node == 1 and not further
    assert len(config.models) * len(config.tasks) * len(config.learning_rates) * len(config.seeds) == count
    few = [f"reproduce.learning_rates=[{config.learning_rates[0]}]", "reproduce.seeds=[0]"]
    few += ["reproduce.only_models=[xlstm_0_1]"] if name != "parity" else []
    trials = trials_of(*read_reproduction(name, few)[::2])
    assert {trial.task for trial in trials} == set(config.tasks)
    if name != "parity":
        for model, task in PUBLISHED[config.published].results:
            assert model in config.models and task in config.tasks


def result(accuracy: float, chance: float = 0.5) -> dict[str, dict[str, float]]:
    return {f"parity/{length}": {"accuracy": accuracy, "chance": chance} for length in (40, 256)}


def test_the_best_rate_counts_by_the_mean_over_its_seeds():
    given = ["reproduce.learning_rates=[0.1,0.01]", "reproduce.seeds=[0,1]", "reproduce.only_models=[xlstm_0_1]"]
    config, _, further = read_reproduction("parity", given)
    trials = trials_of(config, further)
    names = [trial.row.name for trial in trials]
    assert names == [f"xlstm_0_1-parity-{rate}-s{seed}" for rate in ("0.1", "0.01") for seed in (0, 1)]
    results = dict(zip(names, map(result, (1.0, 0.5, 0.9, 0.8)), strict=True))
    (cell,) = cells(config, trials, results)
    assert cell.learning_rate == 0.01 and cell.accuracies == pytest.approx({"parity/40": 0.85, "parity/256": 0.85})
    assert cell.scaled == pytest.approx(0.7) and cell.verdict == "differs" and (cell.scored, cell.planned) == (2, 2)
    assert "0.850 (0.80-0.90)" in as_text(config, [cell])
    del results[names[3]]
    (cell,) = cells(config, trials, results)
    assert (cell.learning_rate, cell.scored, cell.planned) == (0.01, 1, 2)
    assert cells(config, trials, {}) == []


def test_a_verdict_needs_a_number_or_one_of_two_words():
    solved, failed = PublishedResult("s", says="solved"), PublishedResult("s", says="not solved")
    assert [solved.judge(value, None) for value in (1.0, 0.98)] == ["as published", "differs"]
    assert [failed.judge(value, None) for value in (1.0, 0.6)] == ["differs", "as published"]
    number = PublishedResult("s", scaled_accuracy=0.15)
    assert [number.judge(0, value) for value in (0.2, 0.3)] == ["as published", "differs"]
    assert number.judge(0, None) == "ours has no chance level" and str(number) == "0.15"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["party"], "reproduce=party: conf/reproduce/ has no such file"),
        (["parity", "reproduce.steps=0"], "reproduce.steps: must be at least 1 (0)"),
        (
            ["parity", "training.total_steps=3"],
            "the command: training.total_steps=3 is made by the reproduction; change",
        ),
        (
            ["parity", "reproduce.only_models=[mamba]"],
            "reproduce.only_models: there is no such one (mamba); choose among",
        ),
        (
            ["parity", "reproduce.published=all"],
            "reproduce.published: no such results ('all'); choose one of formal, mqar",
        ),
        (["parity", "reproduce.seeds=[1,1]"], "reproduce.seeds: 1 is there twice"),
        (["parity", "corpus.task.shortest=99"], "corpus.task: examples have 99 words at least, and 40 are asked for"),
        (["parity", 'reproduce.tasks.parity.suite=["suite.size=1"]'], "suite.size: no such key"),
    ],
)
def test_what_cannot_be_reproduced_ends_with_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())

"""The benchmark of generation runs from end to end on a CPU."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import inference
from benchmarks.inference_figure import draw
from tests.runs import PATIENCE, ROOT, environment

TINY = ["--size", "tiny", "--device", "cpu", "--prompts", "8", "--new-tokens", "3", "--rounds", "1"]


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.inference", *TINY, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.slow
@pytest.mark.long
def test_every_contender_has_its_rows(tmp_path):
    done = run("--batches", "1,2", "--output", str(tmp_path / "table.md"))
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    for contender in inference.CONTENDERS:
        rows = [line.split("|")[1:-1] for line in table.splitlines() if f"| {contender} |" in line]
        assert [row[0].strip() for row in rows] == ["1", "2"]
        # transformers is installed for these tests: no peer is missing.
        assert all(float(row[3]) > 0 and float(row[7]) > 0 for row in rows), table
    assert (tmp_path / "table.png").is_file()
    assert "- size: tiny (tiny_mlstm, tiny_llama), 3 new tokens" in table


def test_ours_is_measured_in_this_process(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["inference", *TINY, "--batches", "2", "--only", "ours"])
    assert inference.main() == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["contender"], row["batch"], row["prompt"]) == ("ours", 2, 8)
    assert row["first"] > 0 and row["gib"] >= 0 and "problem" not in row


def test_the_table_has_ratios_to_ours_and_reasons():
    rows = [
        {"contender": "ours", "batch": 4, "prompt": 512, "first": 10.0, "further": 2.0, "gib": 1.0},
        {"contender": "transformers_llama", "batch": 4, "prompt": 512, "first": 15.0, "further": 8.0, "gib": 3.0},
        {"contender": "transformers_xlstm", "batch": 4, "prompt": 512, "problem": "ImportError: no such module"},
    ]
    lines = inference.report(rows, {"date": "today"}, "tiny", 9).splitlines()
    assert "| 4 | 512 | ours | 10.0 | 2.00 | 2,000 | 1.00 | 1.00 | 1.00 |" in lines
    assert "| 4 | 512 | transformers_llama | 15.0 | 8.00 | 500 | 3.00 | 1.50 | 4.00 |" in lines
    assert "| 4 | 512 | transformers_xlstm | ImportError: no such module | | | | | |" in lines


def test_the_figure_has_a_line_for_each_contender_and_batch_that_ran(tmp_path):
    rows = [
        {"contender": "ours", "batch": batch, "prompt": prompt, "first": 10.0, "further": 2.0, "gib": 1.0}
        for batch in (1, 8)
        for prompt in (512, 8192)
    ]
    problem = {"contender": "transformers_llama", "batch": 1, "prompt": 512, "problem": "out of memory"}
    draw([*rows, problem], "tiny", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[1:4] == b"PNG"
    draw([problem], "tiny", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_peer_that_is_missing_has_its_reason_and_the_others_their_figures(capsys, monkeypatch):
    def missing(size, device):
        raise ImportError("transformers has no xLSTM")

    monkeypatch.setitem(inference.CONTENDERS, "transformers_xlstm", missing)
    monkeypatch.setattr(sys, "argv", ["inference", *TINY, "--batches", "1", "--only", "transformers_xlstm"])
    assert inference.main() == 0
    assert json.loads(capsys.readouterr().out)["problem"] == "ImportError: transformers has no xLSTM"


def test_too_few_tokens_are_no_figure():
    with pytest.raises(RuntimeError, match=r"\(1, 2\) tokens came in the place of \(1, 1\)"):
        inference.measure(lambda prompts, count: torch.zeros(1, 2), torch.zeros(1, 8), 3, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders", "ours,vllm"], "unknown contender 'vllm'; use of ours, ours_unplayed"),
        (["--batches", "1,none"], "positive whole numbers with commas between them are wanted, not 1,none"),
        (["--new-tokens", "1"], "--new-tokens must be at least 2 and --rounds 1, not 1 and 1"),
    ],
)
def test_mistakes_are_refused(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["inference", *TINY, *arguments])
    with pytest.raises(SystemExit) as ended:
        inference.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err

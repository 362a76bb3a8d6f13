"""The page that compares runs: what it says of whole, unfinished, branched, resumed, broken ones; in a browser."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.chromium import BROWSER, WITHOUT_BROWSER, opened_tab
from tests.train.test_report import HEADER, train_line, write_run
from train.evaluate.suites.base import CaseResult, SuiteResult, SuiteSettings
from train.evaluate.suites.results import append_result, result_line
from train.report import main
from train.report.comparison_page import as_html
from train.report.runs import ComparedRun, read_runs

RELEASED = Path(__file__).resolve().parents[1] / "fixtures" / "0.2.0" / "runs"


def copied(name: str, folder: Path) -> Path:
    """Of a run of version 0.2.0 what the page reads."""
    folder.mkdir(parents=True)
    for file in ("config.yaml", "plan.json", "metrics.jsonl", "events.jsonl"):
        shutil.copyfile(RELEASED / name / file, folder / file)
    return folder


def add_events(folder: Path, *events: dict) -> None:
    with (folder / "events.jsonl").open("a") as file:
        file.writelines(json.dumps({"time": "2026-11-29T20:00:00Z", **event}) + "\n" for event in events)


def table(page: str, heading: str) -> dict[str, list[str]]:
    """First cell -> the others, of the table under a heading."""
    part = page[page.index(f"<h2>{heading}</h2>") :]
    part = part[part.index("<table") : part.index("</table>")]
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in part.split("<tr>")[2:]]
    return {row[0]: row[1:] for row in rows}


def test_whole_runs_are_compared(tmp_path):
    runs = [copied("tied", tmp_path / "one"), copied("neurips", tmp_path / "other")]
    (runs[0] / "evaluations").mkdir()
    for step, loss in ((6, 5.5), (4, 5.75)):
        document = {"format_version": 1, "step": step, "results": {"validation": {"loss": loss, "tokens": 9}}}
        (runs[0] / "evaluations" / f"step-{step:08d}.json").write_text(json.dumps(document))
    old, new = (SuiteResult({"64 tokens": CaseResult({"accuracy": x}, 200, chance=0.5)}) for x in (0.5, 0.75))
    for step, result in ((4, old), (6, new)):
        append_result(runs[1] / "evaluations.jsonl", result_line("parity", SuiteSettings("x"), result, step=step))
    page = as_html(read_runs(runs))
    assert table(page, "Suite parity") == {
        "after step": ["", "6"],
        "64 tokens: accuracy": ["", "0.7500"],
        "64 tokens: examples": ["", "200"],
        "64 tokens: chance": ["", "0.5000"],
        "64 tokens: scaled_accuracy": ["", "0.5000"],
    }
    overview = table(page, "Runs")
    assert overview["state"] == ["complete", "complete"] and overview["steps"] == ["6 of 6", "6 of 6"]
    # plan.json of the first counts 198355.875 FLOPs a token.
    assert overview["training FLOPs"][0] == f"{1536 * 198355.875:.3g}"
    assert overview["parameters"][0] == "28,136"
    lines = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    held_out = next(line for line in reversed(lines) if line["kind"] == "evaluation")
    assert table(page, "Losses")[f"held out: {held_out['set']}"][0] == f"{held_out['loss']:.4f}"
    assert table(page, "Evaluations") == {"validation": ["5.5000 (step 6)", ""]}
    differing = table(page, "Configuration")
    assert differing["model.tie_embeddings"] == ["true", "false"]
    assert not {"name", "seed", "training.sequence_length"} & set(differing)
    assert all(len(set(values)) == 2 for values in differing.values())
    assert "What could not be read" not in page


def test_unfinished_branched_and_resumed_runs_say_what_they_are(tmp_path):
    resumed, branch, unstarted = (copied("tied", tmp_path / name) for name in ("resumed", "branch", "unstarted"))
    add_events(resumed, {"event": "resume", "step": 3}, {"event": "rollback", "step": 5, "to_step": 3})
    add_events(resumed, {"event": "spike", "step": 4, "quantity": "grad_norm", "value": 9.0, "median": 1.0})
    add_events(resumed, {"event": "stop", "step": 5, "reason": "SIGTERM"})
    source = {"source": "/runs/first/checkpoints/step-00000080", "run": "/runs/first", "step": 80}
    add_events(branch, {"event": "branch", **source}, {"event": "complete", "step": 6})
    for name in ("metrics.jsonl", "events.jsonl"):
        (unstarted / name).unlink()
    page = as_html(read_runs([resumed, branch, unstarted]))
    overview, stability = table(page, "Runs"), table(page, "Stability")
    assert overview["state"] == ["stopped (SIGTERM)", "complete", "not started"]
    assert overview["starts"] == ["2", "1", ""] and overview["began from"] == ["", "first@80 (branch)", ""]
    assert stability["rollbacks"] == ["1", "0", ""] and stability["spikes of the gradient norm"] == ["1", "0", ""]
    assert stability["skipped steps"] == ["0", "0", ""]
    assert "unstarted: has no logged step yet, and no curves" in page


def test_what_is_broken_is_named_and_hides_nothing_else(tmp_path):
    whole, torn, headless = (copied("tied", tmp_path / name) for name in ("whole", "torn", "headless"))
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 7}\n\n{"kind": "train", "st')
    with (torn / "events.jsonl").open("a") as file:
        file.write("[1]\n")
    (torn / "evaluations.jsonl").write_text('{"kind": "header", "format_version": 1}\n{"suite": "parity", "resul')
    (torn / "evaluations").mkdir()
    (torn / "evaluations" / "step-00000006.json").write_text('{"results": 7}')
    (headless / "metrics.jsonl").write_text("\0" * 50)
    (headless / "config.yaml").write_text("a: [")
    number = len((whole / "metrics.jsonl").read_text().splitlines()) + 1
    page = as_html(read_runs([whole, torn, headless]))
    assert f"torn: metrics.jsonl, line {number} is not what this file has: {{&quot;kind&quot;" in page
    assert f"torn: metrics.jsonl, line {number + 2} is no JSON object" in page
    assert "torn: events.jsonl, line" in page and "torn: evaluations.jsonl, line 2 is no JSON object" in page
    assert "torn: evaluations/step-00000006.json is not what train.evaluate writes" in page
    assert re.search(r"headless: .*config.yaml: is no YAML", page)
    assert "headless: metrics.jsonl, line 1 is no JSON object" in page
    assert table(page, "Runs")["steps"] == ["6 of 6", "6 of 6", "0"]
    assert table(page, "Runs")["state"][2] == "not known"


def test_names_of_runs_and_values_are_texts(tmp_path):
    runs = [write_run(tmp_path / name, blocks=0, steps=20) for name in ("<b>$x$", "y")]
    page = as_html(read_runs(runs))
    assert "<b>" not in page and "&lt;b&gt;$x$" in page
    assert "has no curves over FLOPs, its configuration does not say how large its model is" in page


def test_evaluations_lie_where_their_tokens_were_read():
    # The batch doubles at step 10, where a branch begins.
    lines = [{"step": step, "tokens": 100 * step if step <= 10 else 1000 + 200 * (step - 10)} for step in (5, 10, 15)]
    run = ComparedRun("x", Path("x"), train=lines)
    assert run.over("tokens", np.array([5.0, 12.0, 15.0])).tolist() == [500.0, 1400.0, 2000.0]
    assert run.over("steps", np.array([5.0])).tolist() == [5.0]
    assert np.isnan(run.over("FLOPs", np.array([5.0]))).all()


def test_the_command_writes_page_and_picture_and_refuses_what_is_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = str(write_run(tmp_path / "run", blocks=2, steps=20))
    assert main([run, "--output", "pages/one.html"]) == 0
    assert capsys.readouterr().out == "pages/one.html\n"
    assert "<h1>Run run</h1>" in Path("pages/one.html").read_text()
    assert main([run, "--output", "pages/one.html/x.html"]) == 1
    assert "pages/one.html/x.html cannot be written (" in capsys.readouterr().err
    Path("empty").mkdir()
    assert main([run, "empty"]) == 2
    assert "empty/metrics.jsonl: no such file" in capsys.readouterr().err
    Path("begun").mkdir()
    Path("begun/metrics.jsonl").write_text(json.dumps(HEADER) + "\n")
    assert main(["begun", "begun", "--output", "x.html"]) == 0
    assert main(["begun", "begun/.", "--output", "x.png"]) == 2
    assert "has no logged step yet" in capsys.readouterr().err
    Path("begun/metrics.jsonl").write_text(json.dumps(HEADER | {"format_version": 99}) + "\n")
    Path("later").mkdir()
    Path("later/metrics.jsonl").write_text(json.dumps(HEADER | {"format_version": 99}) + "\n")
    assert main([run, "later"]) == 2
    assert "99" in capsys.readouterr().err


SIZES = [(390, True), (1280, False)]
SIDEWAYS = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BEYOND = (
    "[...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && e.getBoundingClientRect().right "
    "> document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))"
)
SHOWN = """[...document.querySelectorAll('.curves img')].filter(e => e.checkVisibility())
    .map(e => [(e.alt.split(' over ')[1] || '').split(',')[0], e.naturalWidth])"""


@pytest.mark.skipif(BROWSER is None, reason=WITHOUT_BROWSER)
def test_a_browser_shows_the_page_on_a_phone_and_on_a_desk_and_fetches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long = "a-run-with-a-name-as-sweeps-make-them_" + "learning_rate=0.003_" * 3
    runs = [copied("tied", tmp_path / "first"), copied("mixed", tmp_path / long), write_run(tmp_path / "third", 3, 100)]
    assert main([str(run) for run in runs]) == 0
    many = [write_run(tmp_path / f"{number}{long[:40]}", 0, 4) for number in range(9)]
    assert main([*map(str, many), str(runs[0]), "--output", "many.html"]) == 0
    outside = tmp_path / "outside.html"
    outside.write_text('<img src="http://127.0.0.1:9/x.png"><p style="width: 3000px">wide')
    with opened_tab(tmp_path / "profile") as tab:
        for page in (Path("comparison.html"), Path("many.html")):
            for width, is_phone in SIZES:
                tab.open(page, width, is_phone)
                tab.says("document.querySelectorAll('details').forEach(one => one.open = true)")
                for axis in ("tokens", "steps", "FLOPs"):
                    tab.says(f"document.getElementById('over-{axis}').click()")
                    shown = tab.says(SHOWN)
                    assert {of for of, _ in shown} == {axis} and all(pixels > 300 for _, pixels in shown)
                    assert tab.says(SIDEWAYS) <= 0 and tab.says(BEYOND) == []
                assert tab.requests() == [page.resolve().as_uri()]
        tab.screenshot(tmp_path / "shot.png")
        assert (tmp_path / "shot.png").stat().st_size > 50_000
        # What is asserted above would be seen.
        tab.open(outside, 390, False)
        assert "http://127.0.0.1:9/x.png" in tab.requests()
        assert tab.says(SIDEWAYS) > 0 and tab.says(BEYOND)


def test_nothing_in_the_page_leads_outside(tmp_path):
    page = as_html(read_runs([write_run(tmp_path / name, 2, 20) for name in "ab"]))
    without_pictures = re.sub(r'src="data:image/png;base64,[^"]*"', "", page)
    assert not re.findall(r"\bsrc=|\bhref=|url\(|@import|<script|<link|<iframe|http", without_pictures)
    assert train_line(20)["loss"] > 0 and page.count('src="data:image/png') > 10

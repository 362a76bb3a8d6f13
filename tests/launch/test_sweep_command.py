"""`python -m launch sweep`: tables in, a page and predictions out; what is refused, and how."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.scaling.runs import read_runs
from tests.launch.tables import FIXTURE, LAWS
from tests.runs import PATIENCE, ROOT, environment

RELEASED = ROOT / "tests" / "fixtures" / "0.2.0" / "runs"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fit of the fixture, with what the command printed in printed.txt."""
    folder = tmp_path_factory.mktemp("fits") / "scaling"
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["sweep", "fit", str(FIXTURE), "--output", str(folder), "--resamples", "40"]) == 0
    (folder / "printed.txt").write_text(printed.getvalue(), encoding="utf-8")
    return folder


def test_the_page_needs_nothing_else_and_says_everything(fitted: Path) -> None:
    page = (fitted / "scaling.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "<script" not in page and "url(" not in page
    assert page.count("data:image/png;base64,") == 4
    for text in (
        "alpha",
        "gamma",
        "compute ratio",
        "mlstm-diverged",
        "its held-out loss is not finite",
        "attention-027",
    ):
        assert text in page
    # A row for each run, with its figures.
    table = page[page.index("All 57 runs") :]
    assert table.count("<tr>") == 58
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page).lower()


def test_the_same_command_gives_the_same_files_and_markup_in_names_stays_text(tmp_path: Path) -> None:
    rows = [line for line in FIXTURE.read_text(encoding="utf-8").splitlines() if not line.startswith("mlstm")]
    # So few that gamma is not fitted.
    table = "\n".join([rows[0], *rows[12:23]]).replace("attention,", "<b>at$t$</b>,")
    (tmp_path / "runs.csv").write_text(table, encoding="utf-8")
    for folder in ("one", "other"):
        output = str(tmp_path / folder)
        assert main(["sweep", "fit", str(tmp_path / "runs.csv"), "--output", output, "--resamples", "20"]) == 0
    for name in ("fit.json", "runs.csv", "scaling.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name
    page = (tmp_path / "one" / "scaling.html").read_text(encoding="utf-8")
    assert "<b>" not in page and "&lt;b&gt;at$t$&lt;/b&gt;" in page
    assert "L(N, D) with gamma: too few runs for 6 coefficients (11); add runs until there are 12" in page


def test_fit_prints_exponents_with_intervals_and_what_was_left_out(fitted: Path) -> None:
    printed = (fitted / "printed.txt").read_text(encoding="utf-8")
    assert "excluded: mlstm-diverged: its held-out loss is not finite" in printed
    assert re.search(r"N\(C\) ~ C\^0\.\d{4} \[0\.\d{4}, 0\.\d{4}\]", printed)
    assert re.search(r"alpha 0\.\d+ \[0\.\d+, 0\.\d+\]", printed)
    # 3 % of a loss of about 3.
    gaps = [float(found) for found in re.findall(r"attention - mlstm, context 2,048, \S+ FLOPs: (\S+) \[", printed)]
    assert len(gaps) == 4 and all(0.04 < gap < 0.16 for gap in gaps)


def test_predictions_know_the_truth(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "predict", str(fitted), "--flops", "1e19", "--flops", "1e21"]) == 0
    at_1e19, at_1e21 = capsys.readouterr().out.split("\n\nBest use of 1e+21")
    assert "extrapolated" not in at_1e19 and "extrapolated: 33.3 times the largest run" in at_1e21
    mlstm = at_1e19[at_1e19.index("mlstm") :]
    found = re.findall(r"^  (\S.*?)  +parameters \S+ \[(\S+), (\S+)\]", mlstm, flags=re.M)
    assert [name for name, _, _ in found] == ["IsoFLOP", "L(N, D)", "L(N, D) with gamma"]
    for name, low, high in found:
        assert float(low) < LAWS["mlstm"].optimal_size(1e19) < float(high), name


def test_runs_of_0_2_0_are_collected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "tables" / "runs.csv"
    runs = [str(RELEASED / name) for name in ("tied", "mixed", "neurips")]
    assert main(["sweep", "collect", *runs, str(FIXTURE), "--output", str(output)]) == 0
    table = read_runs([output])
    by_name = {run.run: run for run in table.runs}
    tied = by_name["tied"]
    assert (tied.family, tied.parameters, tied.tokens, tied.context) == ("mlstm", 28136, 1536, 32)
    assert tied.loss == pytest.approx(5.056562900543213)
    # plan.json of that run counts 198355.875 FLOPs a token.
    assert tied.flops == pytest.approx(1536 * 198355.875)
    assert by_name["mixed"].family == "mlstm+slstm+attention"
    assert len(table.runs) == 3 + 57
    assert f"{len(table.used)} runs to fit" in capsys.readouterr().out


def test_runs_that_have_not_ended_are_in_the_table_with_the_reason(tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    run.mkdir()
    for name in ("config.yaml", "plan.json", "metrics.jsonl", "events.jsonl"):
        (run / name).write_bytes((RELEASED / "tied" / name).read_bytes())
    events = (run / "events.jsonl").read_text().splitlines()
    stop = {"time": "2026-11-28T11:00:00Z", "event": "stop", "step": 6, "reason": "SIGTERM"}
    (run / "events.jsonl").write_text("\n".join([*events[:-1], json.dumps(stop)]) + "\n")
    output = tmp_path / "runs.csv"
    assert main(["sweep", "collect", str(run), "--output", str(output)]) == 0
    (row,) = read_runs([output]).runs
    assert row.excluded == "stopped (SIGTERM), after 6 steps"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "nowhere.csv", "--output", "x"], "nowhere.csv: no such file"),
        (["fit", ".", "--output", "x"], "is a folder; gather the runs in it with `collect` first"),
        (["fit", str(FIXTURE), "--output", "x", "--resamples", "5"], "too few for an interval (5); take 20 or more"),
        (["fit", str(FIXTURE), "--output", "x", "--column", "loss"], "write NAME=THEIRS"),
        (["predict", "nowhere", "--flops", "1e21"], "nowhere: no such file; make it with `sweep fit"),
        (["predict", str(FIXTURE), "--flops", "1e21"], "is no fit; name the folder that `sweep fit` wrote"),
        (["fit", str(FIXTURE), "--output", str(FIXTURE)], "scaling_runs.csv is a file; name a folder"),
        (["fit", str(FIXTURE), "--output", "s3://bucket/x"], "--output: must be a folder of this machine"),
        (["collect", str(RELEASED / "tied"), "--output", "."], ". is a folder; name the CSV file to write"),
        (["collect", "nowhere", "--output", "x.csv"], "nowhere: is no run's directory"),
        (
            ["collect", str(RELEASED / "tied"), "--set", "books", "--output", "x.csv"],
            "scores no set books; choose one of",
        ),
    ],
)
def test_what_the_user_must_change_is_2_and_leaves_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []


def test_too_few_runs_are_refused_with_what_to_add(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = FIXTURE.read_text(encoding="utf-8").splitlines()[:6]
    (tmp_path / "few.csv").write_text("\n".join(few), encoding="utf-8")
    assert main(["sweep", "fit", str(tmp_path / "few.csv"), "--output", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert "too few runs for any fit" in error
    assert "mlstm, context 2,048: L(N, D): too few runs for 5 coefficients (5); add runs until there are 10" in error
    assert "add budgets until there are 3, of 5 runs or more each" in error
    assert not (tmp_path / "x").exists()


def test_a_fit_of_a_later_version_and_a_damaged_one_are_refused(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((fitted / "fit.json").read_text(encoding="utf-8"))
    stored = tmp_path / "fit.json"
    stored.write_text(json.dumps(content | {"format_version": 2}), encoding="utf-8")
    assert main(["sweep", "predict", str(tmp_path), "--flops", "1e21"]) == 2
    assert "a later version wrote it: upgrade xlstm-pretrain" in capsys.readouterr().err
    del content["groups"][0]["token_cost"]
    stored.write_text(json.dumps(content), encoding="utf-8")
    assert main(["sweep", "predict", str(stored), "--flops", "1e21"]) == 2
    assert "is damaged (KeyError: 'token_cost'); fit the runs again" in capsys.readouterr().err


@pytest.mark.parametrize("flops", ["0", "-1e20", "nan", "many"])
def test_a_budget_is_a_positive_number(flops: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "predict", "x", f"--flops={flops}"])
    assert ended.value.code == 2
    assert "is no positive number of FLOPs, such as 1e21" in capsys.readouterr().err


def test_help_and_predictions_do_without_slow_imports(fitted: Path) -> None:
    """What takes seconds to import: torch always, scipy and matplotlib where nothing is fitted or drawn."""
    loaded = "import sys; from launch.__main__ import main; {}; print(*sys.modules, file=sys.stderr)"
    predict = loaded.format(f"main(['sweep', 'predict', {str(fitted)!r}, '--flops', '1e21'])")
    for program, unwanted in ((predict, {"torch", "matplotlib"}), (loaded.format("0"), {"scipy", "torch", "numpy"})):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        assert not unwanted & set(done.stderr.split()), program

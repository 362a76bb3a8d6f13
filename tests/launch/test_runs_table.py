"""Tables of runs: what is read from anyone's CSV, what is refused with row and reason, what is marked."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.scaling.runs import COLUMNS, Group, as_csv, read_runs
from tests.launch.tables import FIXTURE, invented_runs
from tests.runs import ROOT


def write(folder: Path, text: str, name: str = "runs.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """The fixture, which the documentation uses, too."""
    text = as_csv(invented_runs())
    assert FIXTURE.read_text(encoding="utf-8") == text
    table = read_runs([FIXTURE])
    assert as_csv(table.runs) == text
    assert len(table.used) == 56 and [run.run for run in table.excluded] == ["mlstm-diverged"]
    assert list(table.by_group()) == [Group("attention", 2048), Group("mlstm", 2048)]
    assert table.notes == []


def test_other_names_of_columns_are_known(tmp_path: Path) -> None:
    header = "model,num_params,tokens,flops,context_length,val_loss,isoflop_budget,lr"
    table = read_runs([write(tmp_path, f"{header}\nmlstm,1e8,2e9,1.3e18,2048,3.2,1e18,0.1\n")])
    (run,) = table.runs
    assert (run.family, run.parameters, run.context, run.loss, run.budget) == ("mlstm", 1e8, 2048, 3.2, 1e18)
    assert run.run == "runs.csv, row 1"


def test_a_column_may_be_named(tmp_path: Path) -> None:
    path = write(tmp_path, "size,tokens,ce\n1e8,2e9,3.2\n")
    with pytest.raises(ValueError) as refused:
        read_runs([path])
    assert "has no column parameters or num_params or n_params or params (its columns: size, tokens, ce)" in str(
        refused.value
    )
    assert "--column parameters=THEIRS" in str(refused.value) and "--column loss=THEIRS" in str(refused.value)
    (run,) = read_runs([path], {"parameters": "size", "loss": "ce"}).runs
    assert (run.family, run.parameters, run.context) == ("runs", 1e8, None)
    with pytest.raises(ValueError, match="there is no column width; the columns are run, family"):
        read_runs([path], {"width": "size"})


def test_flops_that_no_one_counted_are_6nd_and_the_page_says_so(tmp_path: Path) -> None:
    table = read_runs([write(tmp_path, "parameters,tokens,loss\n1e8,2e9,3.2\n")])
    assert table.runs[0].flops == 6 * 1e8 * 2e9
    assert table.notes == ["runs.csv has no column flops; the FLOPs of its runs are 6 x parameters x tokens"]


def test_bad_rows_are_named_all_at_once(tmp_path: Path) -> None:
    rows = [
        "run,parameters,tokens,flops,context,loss",
        "fine,1e8,2e9,1e18,2048,3.2",
        "torn,1e8,2e9",
        "text,1e8,many,1e18,2048,3.2",
        "diverged,1e8,2e9,1e18,2048,nan",
        "negative,-1e8,2e9,1e18,20.5,inf",
        "long,1e8,2e9,1e18,2048,3.2,,,more",
    ]
    with pytest.raises(ValueError) as refused:
        read_runs([write(tmp_path, "\n".join(rows)), tmp_path / "nowhere.csv"])
    lines = str(refused.value).splitlines()
    assert lines[0] == "10 problems in the table of runs:"
    for place, problem in [
        ("row 2, line 3 (torn)", "flops is empty"),
        ("row 2, line 3 (torn)", "loss is empty"),
        ("row 3, line 4 (text)", "tokens is no number (many)"),
        ("row 4, line 5 (diverged)", "loss is no number (nan)"),
        ("row 5, line 6 (negative)", "parameters must be positive and finite (-1e8)"),
        ("row 5, line 6 (negative)", "context must be a whole number of tokens (20.5)"),
        ("row 5, line 6 (negative)", "loss must be positive and finite (inf)"),
        ("row 6, line 7 (long)", "has more values than the header has names (6)"),
    ]:
        assert any(place in line and problem in line for line in lines), (place, problem)
    assert any("write into their column 'excluded' why they must not be fitted" in line for line in lines)
    assert any("nowhere.csv: no such file" in line for line in lines)


def test_long_lists_of_problems_are_cut(tmp_path: Path) -> None:
    rows = "".join("1e8,2e9,bad\n" for _ in range(30))
    with pytest.raises(ValueError, match="31 problems") as refused:
        read_runs([write(tmp_path, f"parameters,tokens,loss\n{rows}")])
    assert str(refused.value).splitlines()[-1] == "  - ... and 11 more"


def test_rows_with_a_reason_are_kept_and_not_checked(tmp_path: Path) -> None:
    table = read_runs([write(tmp_path, "parameters,tokens,loss,excluded\n1e8,,,diverged at step 900\n1e8,2e9,3.2,\n")])
    assert [run.excluded for run in table.runs] == ["diverged at step 900", ""]
    assert len(table.used) == 1


def test_runs_that_are_listed_twice_count_once(tmp_path: Path) -> None:
    first = write(tmp_path, "run,parameters,tokens,loss\na,1e8,2e9,3.2\nb,1e8,2e9,3.3\n", "first.csv")
    again = write(
        tmp_path, "run,family,parameters,tokens,loss\nc,first,1e8,2e9,3.2\nd,other,1e8,2e9,3.2\n", "again.csv"
    )
    table = read_runs([first, again])
    assert {run.run: run.excluded for run in table.runs if run.excluded} == {"c": "has exactly the figures of a"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "has no column parameters"),
        (b"parameters,tokens,loss\n", "has no rows"),
        (b"parameters,tokens,loss\n\xff\xfe,1,1\n", "is no text in UTF-8"),
    ],
)
def test_files_that_are_no_tables_are_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        read_runs([path])


def test_a_byte_order_mark_and_spaces_in_the_header_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_bytes("\ufeffparameters, tokens ,loss\r\n1e8, 2e9 ,3.2\r\n".encode())
    assert read_runs([path]).runs[0].tokens == 2e9


def test_the_page_of_the_documentation_has_every_column() -> None:
    page = (ROOT / "docs" / "scaling_laws.md").read_text(encoding="utf-8")
    for column in COLUMNS:
        assert f"| `{column}` |" in page, column

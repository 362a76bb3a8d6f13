"""A run's folder: what kills and others leave in it, who may read it, and a disk that takes nothing."""

import json
import os
import re
import stat
from pathlib import Path

import pytest

from model.__main__ import main as model_main
from tests.privileges import permissions_hold
from tests.train.plain_runs import copied_run, run_plainly, saved_run
from train.__main__ import main
from train.callbacks.metrics_file import read_metrics
from train.report import main as draw_report
from train.run_directory import RunDirectory, read_events
from train.run_summary import summarise


@pytest.fixture(scope="module")
def base(small_corpus, tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("folder"), small_corpus, "schedule=constant", "logging.csv=true")


@pytest.fixture
def run(base, tmp_path):
    """(a copy of a run of two steps, what starts it)"""
    return copied_run(base, tmp_path)


def test_the_next_start_removes_what_kills_left_of_files_under_work_and_nothing_else(run):
    folder, overrides = run
    killed = [
        "metrics.jsonl.0123456789ab.partial",
        "plan.json.0123456789ab.partial",
        "config.yaml.ba9876543210.partial",
        "configurations/0002.yaml.0123456789ab.partial",
    ]
    others = ["baselines.json.0123456789ab.partial", "metrics.jsonl.mine.partial", "notes.0123456789ab.partial"]
    for name in (*killed, *others):
        (folder / name).write_text("torn")
    assert run_plainly([*overrides, "training.total_steps=3"]) == 0
    assert sorted(path.name for path in folder.rglob("*.partial")) == sorted(others)


FOREIGN_LINES = [
    '{"step": 2}',
    '{"kind": "train"}',
    '{"kind": 3, "step": 2}',
    '{"step": "x", "kind": "train"}',
    "[]",
    "7",
]


@pytest.mark.parametrize("line", [*FOREIGN_LINES, '"text"', "null", "[" * 100_000])
def test_a_line_that_is_no_measurement_and_no_event_disturbs_no_reader(run, line, capsys):
    folder, overrides = run
    before = read_metrics(folder), read_events(folder), summarise(folder)
    for name in ("metrics.jsonl", "events.jsonl"):
        lines = (folder / name).read_text().splitlines()
        (folder / name).write_text("\n".join([*lines[:2], line, *lines[2:], line]) + "\n")
    assert (read_metrics(folder), read_events(folder), summarise(folder)) == before
    assert draw_report([str(folder)]) == 0
    assert draw_report([str(folder), str(folder), "--output", str(folder / "both.png")]) == 0
    assert model_main(["describe", str(folder)]) == 0
    assert run_plainly([*overrides, "training.total_steps=3"]) == 0
    assert [line["step"] for line in read_metrics(folder) if line["kind"] == "train"] == [1, 2, 3]
    assert "Traceback" not in capsys.readouterr().err


def test_what_is_not_committed_is_for_the_user_alone(run):
    folder, overrides = run
    assert stat.S_IMODE((folder / "code.json").stat().st_mode) == 0o600
    # An earlier version's, which all may read, does not stay so.
    (folder / "code.json").chmod(0o644)
    before = os.umask(0o022)
    try:
        assert run_plainly([*overrides, "training.total_steps=3"]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "code.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "plan.json").stat().st_mode) == 0o644
    assert json.loads((folder / "code.json").read_text()).keys() == {"revision", "difference"}


@pytest.mark.parametrize("place", [".", "new/deeper", "run", "run/checkpoints", "run/logs"])
def test_a_root_that_takes_nothing_is_refused_before_the_run_begins(run, tmp_path, place, capsys):
    folder, overrides = run
    closed = tmp_path if place.startswith(("new", ".")) else tmp_path / place
    root = tmp_path / "new" / "deeper" if place.startswith("new") else tmp_path
    name = "other" if place == "." else "run"
    overrides = [*overrides, f"run_root={root}", f"name={name}", "training.total_steps=3"]
    closed.chmod(0o500)
    try:
        with permissions_hold():
            for more in ([], ["--plan"]):
                assert main([*more, *overrides]) == 2
                assert f"run_root: {closed} cannot be written to, its permissions do not allow it; change that, or" in (
                    capsys.readouterr().err
                )
    finally:
        closed.chmod(0o700)
    assert not (root / "other").exists()


def test_a_read_only_file_system_is_called_one():
    read_only = [
        place
        for place in re.findall(r"^\S+ (\S+) \S+ ro[, ]", Path("/proc/mounts").read_text(), re.MULTILINE)
        if os.path.isdir(place) and not os.access(place, os.W_OK)
    ]
    if not read_only:
        pytest.skip("this machine has no folder on a read-only file system")
    (problem,) = RunDirectory(Path(read_only[0]) / "runs" / "first").unwritable()
    assert "cannot be written to, its file system is read-only; change that, or set run_root elsewhere" in problem

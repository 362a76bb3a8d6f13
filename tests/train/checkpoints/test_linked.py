"""Old checkpoints on another disk, with links in their place: read, never deleted, no hindrance to what is saved."""

import json
import os
import shutil

import pytest

from tests.runs import TINY_RUN
from tests.train.plain_runs import figures, run_plainly
from train.checkpoint import main
from train.checkpoints.layout import remove_after, remove_torn


@pytest.fixture
def overrides(small_corpus, tmp_path):
    run = [f"run_root={tmp_path}", f"corpus.directory={small_corpus}", *TINY_RUN, "name=run", "schedule=constant"]
    return [*run, "checkpoint.interval=1", "checkpoint.keep_last=1", "parallel=zero0"]


def move(folder, elsewhere):
    """Move a checkpoint to another place and link to it; returns the place, and a function that gives its files."""
    elsewhere.mkdir(exist_ok=True)
    place = elsewhere / folder.name
    shutil.move(folder, place)
    folder.symlink_to(os.path.relpath(place, folder.parent))
    return place, lambda: {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def events(run, kind):
    return [line for line in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if line["event"] == kind]


def test_a_run_goes_on_from_links_saves_beside_them_and_deletes_none(overrides, tmp_path, capsys):
    checkpoints = tmp_path / "run" / "checkpoints"
    assert run_plainly([*overrides, "training.total_steps=1"]) == 0
    place, files = move(checkpoints / "step-00000001", tmp_path / "archive")
    before = files()
    # The newest is a link; then it is an old one, whose turn to be deleted has come.
    assert run_plainly([*overrides, "training.total_steps=3"]) == 0
    assert events(tmp_path / "run", "resume")[0]["checkpoint"] == "step-00000001"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000001", "step-00000003"]
    assert (checkpoints / "step-00000001").is_symlink() and files() == before
    assert run_plainly([*overrides, "training.total_steps=4"]) == 0
    assert (checkpoints / "step-00000001").is_symlink() and files() == before
    assert not events(tmp_path / "run", "error")
    assert main(["list", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(f"  link to {place}")
    assert [line[0] for line in figures(tmp_path / "run") if len(line) == 4] == [1, 2, 3, 4]


def test_a_damaged_checkpoint_behind_a_link_is_passed_over_and_its_link_set_aside(overrides, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    assert run_plainly([*overrides, "training.total_steps=2", "checkpoint.keep_last=2"]) == 0
    place, files = move(checkpoints / "step-00000002", tmp_path / "archive")
    (place / "state.json").write_text("{}")
    before = files()
    assert run_plainly([*overrides, "training.total_steps=2", "checkpoint.keep_last=2"]) == 0
    assert [event["checkpoint"] for event in events(tmp_path / "run", "reject")] == ["step-00000002"]
    assert not (checkpoints / "step-00000002").is_symlink()
    assert (checkpoints / "step-00000002" / "complete.json").is_file()
    aside = checkpoints / "set-aside-step-00000002"
    assert aside.is_symlink() and aside.resolve() == place and files() == before


def test_links_are_no_torn_saves_and_a_rollback_sets_them_aside(tmp_path):
    root, places = tmp_path / "run" / "checkpoints", []
    root.mkdir(parents=True)
    for step in (1, 2):
        (root / f"step-0000000{step}" / "weights").mkdir(parents=True)
        places.append(move(root / f"step-0000000{step}", tmp_path / "archive")[0])
    # As where the other disk is not mounted.
    (root / "step-00000003").symlink_to(tmp_path / "unmounted")
    assert remove_torn(root) == []
    (places[1] / "complete.json").touch()
    assert remove_after(root, 0) == ["step-00000001", "step-00000002"]
    assert sorted(path.name for path in root.iterdir()) == [
        "set-aside-step-00000001",
        "set-aside-step-00000002",
        "step-00000003",
    ]
    assert all((place / "weights").is_dir() for place in places) and (places[1] / "complete.json").exists()

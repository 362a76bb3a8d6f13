"""Whatever is wrong with the newest checkpoint, the one before is taken, and the run says what is wrong with which."""

import json
import os
import shutil

import pytest

from tests.privileges import permissions_hold
from tests.train.plain_runs import copied_run, run_plainly, saved_run, train_losses
from train.checkpoints.layout import MARKER, describe_file
from train.run_directory import read_events


@pytest.fixture(scope="module")
def base(small_corpus, tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("damaged"), small_corpus, "schedule=constant")


@pytest.fixture
def run(base, tmp_path):
    """(a copy of a run of two checkpoints, what starts it)"""
    return copied_run(base, tmp_path)


def sign(newest):
    """Have the marker describe the files as they are now."""
    marker = json.loads((newest / MARKER).read_text())
    marker["files"] = {name: describe_file(newest / name) for name in marker["files"] if (newest / name).exists()}
    (newest / MARKER).write_text(json.dumps(marker))


def write(name, content):
    def damage(newest):
        (newest / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return damage


def signed(damage):
    def both(newest):
        damage(newest)
        sign(newest)

    return both


def pipe(name):
    def damage(newest):
        (newest / name).unlink()
        os.mkfifo(newest / name)

    return damage


def forbidden(name):
    def damage(newest):
        (newest / name).chmod(0)

    return damage


def a_folder_in_its_place(newest):
    (newest / MARKER).unlink()
    (newest / MARKER).mkdir()


def without_a_file(part):
    def damage(newest):
        marker = json.loads((newest / MARKER).read_text())
        marker["files"] = {name: file for name, file in marker["files"].items() if not name.startswith(part)}
        (newest / MARKER).write_text(json.dumps(marker))

    return damage


def change_of_state(**changes):
    def damage(newest):
        state = json.loads((newest / "state.json").read_text()) | changes
        (newest / "state.json").write_text(json.dumps({key: value for key, value in state.items() if value is not ...}))
        sign(newest)

    return damage


def another_model(newest):
    path = newest / "weights" / "model.json"
    path.write_text(path.read_text().replace('"vocab_size": 384', '"vocab_size": 512'))


MARKED = f"step-00000002/{MARKER}"
DAMAGES = {
    "marker: no JSON": (write(MARKER, "\0\0"), f"{MARKED} cannot be read"),
    "marker: a list": (write(MARKER, []), f"{MARKED} cannot be read: it holds no JSON object"),
    "marker: without keys": (write(MARKER, {"format_version": 1}), "its 'files' do not give each file's size"),
    "marker: a pipe": (pipe(MARKER), f"{MARKED} cannot be read: it is no regular file"),
    "marker: a folder": (a_folder_in_its_place, f"{MARKED} cannot be read: it is no regular file"),
    "marker: forbidden": (forbidden(MARKER), f"{MARKED} cannot be read: [Errno 13] Permission denied"),
    "folder: forbidden": (forbidden(""), f"{MARKED} cannot be read: [Errno 13] Permission denied"),
    "weights: forbidden": (
        forbidden("weights/weights-00000.safetensors"),
        "weights/weights-00000.safetensors cannot be read: Permission denied",
    ),
    "weights: a pipe": (pipe("weights/weights-00000.safetensors"), "which is a named pipe"),
    "weights: none listed": (without_a_file("weights/weights"), "holds no weights-*.safetensors file"),
    "weights: of another content": (signed(write("weights/weights-00000.safetensors", "x")), "damaged or cut short"),
    "moments: none": (signed(lambda newest: shutil.rmtree(newest / "exp_avg")), "exp_avg holds no weights-*"),
    "model: none": (signed(write("weights/model.json", {"format_version": 1})), "has no section 'model'"),
    "model: another": (signed(another_model), "weights holds other parameters than its model.json describes"),
    "generators: none listed": (without_a_file("random"), "lists no random-00000.json, though 1 ranks saved it"),
    "generators: other content": (signed(write("random-00000.json", [])), "cannot be read (TypeError: "),
    "state: a pipe": (pipe("state.json"), "which is a named pipe"),
    "state: a list": (signed(write("state.json", [])), "state.json cannot be read: it holds no JSON object"),
    "state: a missing key": (change_of_state(step=...), "keys are missing (['step'])"),
    "state: a text for a number": (change_of_state(step="2"), "unknown or of a wrong type (['step'])"),
    "state: an unknown key": (change_of_state(new=1), "unknown or of a wrong type (['new'])"),
    "state: zeros": (write("state.json", "\0" * 100), "state.json has 100 bytes, not "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_is_taken_and_the_damage_named(run, damage, capfd):
    folder, overrides = run
    make, words = DAMAGES[damage]
    before = train_losses(folder)
    newest = folder / "checkpoints" / "step-00000002"
    make(newest)
    strict = [*overrides, "training.total_steps=3", "checkpoint.on_corrupt=fail"]
    with permissions_hold():
        assert run_plainly(strict) == 1
        said = capfd.readouterr().err
        assert "train: step-00000002: " in said and words in said
        assert "move it away, or set checkpoint.on_corrupt=skip to go on from the one before (fail)" in said
        assert not [event for event in read_events(folder) if event["event"] == "reject"]
        assert train_losses(folder) == before

        assert run_plainly([*overrides, "training.total_steps=3"]) == 0
    said = capfd.readouterr().err
    assert "WARNING    step-00000002 is passed over: " in said and words in said
    assert words in (folder / "logs" / "rank-00000.log").read_text()
    events = read_events(folder)
    (rejected,) = [event for event in events if event["event"] == "reject"]
    assert rejected["checkpoint"] == "step-00000002" and words in rejected["problem"]
    assert [event["step"] for event in events if event["event"] == "resume"] == [1]
    losses = train_losses(folder)
    assert losses.keys() == {1, 2, 3} and losses[2] == before[2]
    # It was written again.
    assert {path.name for path in (folder / "checkpoints").iterdir()} >= {f"step-0000000{n}" for n in (1, 2, 3)}
    assert run_plainly([*overrides, "training.total_steps=4"]) == 0
    assert len([event for event in read_events(folder) if event["event"] == "reject"]) == 1


def test_an_old_checkpoint_that_cannot_be_deleted_ends_no_run(run):
    folder, overrides = run
    (folder / "checkpoints" / "step-00000001" / "weights").chmod(0o500)
    (folder / "checkpoints" / "step-00000002").chmod(0)
    with permissions_hold():
        assert run_plainly([*overrides, "training.total_steps=4", "checkpoint.keep_last=1"]) == 0
    assert "step-00000001 cannot be deleted: " in (folder / "logs" / "rank-00000.log").read_text()
    # Of this one nobody can say that it is not kept.
    assert (folder / "checkpoints" / "set-aside-step-00000002" / MARKER).is_file()
    assert (folder / "checkpoints" / "step-00000004" / MARKER).is_file()


def later(name):
    def change(newest):
        content = json.loads((newest / name).read_text())
        (newest / name).write_text(json.dumps({**content, "format_version": 9, "new": 1}))
        if name != MARKER:
            sign(newest)

    return change


@pytest.mark.parametrize("name", [MARKER, "state.json", "weights/model.json"])
@pytest.mark.parametrize("policy", ["skip", "fail"])
def test_a_checkpoint_of_a_later_version_is_refused_and_never_passed_over(run, name, policy, capfd):
    folder, overrides = run
    later(name)(folder / "checkpoints" / "step-00000002")
    with pytest.raises(ValueError, match=f"{name} has format_version 9; .* upgrade xlstm-pretrain"):
        run_plainly([*overrides, "training.total_steps=3", f"checkpoint.on_corrupt={policy}"])
    assert not [event for event in read_events(folder) if event["event"] in ("reject", "resume")]


def test_a_choice_that_does_not_exist_is_refused(run):
    with pytest.raises(
        ValueError, match=r"checkpoint.on_corrupt: no such choice \('ignore'\); choose one of fail, ski"
    ):
        run_plainly([*run[1], "training.total_steps=3", "checkpoint.on_corrupt=ignore"])


@pytest.mark.parametrize("content", ["\0" * 300, "", "[1]", "name: run", "a: [", None])
def test_a_damaged_config_is_done_without_and_named(run, content, capfd):
    """As a crash of the machine leaves it. What the run was started with is kept once more."""
    folder, overrides = run
    (folder / "config.yaml").unlink()
    os.mkfifo(folder / "config.yaml") if content is None else (folder / "config.yaml").write_text(content)
    longer = [*overrides, "training.total_steps=3"]
    with pytest.raises(ValueError, match="checkpoint.on_corrupt: .*config.yaml: .*; restore it, or set skip"):
        run_plainly([*longer, "checkpoint.on_corrupt=fail"])
    with pytest.raises(ValueError, match="seed: .* was started with another value"):
        run_plainly([*longer, "seed=5"])
    assert run_plainly(longer) == 0
    assert f"WARNING    {folder / 'config.yaml'}: " in capfd.readouterr().err
    (event,) = [event for event in read_events(folder) if event["event"] == "unreadable"]
    assert event["problem"].startswith(f"{folder / 'config.yaml'}: ")
    assert train_losses(folder).keys() == {1, 2, 3}
    assert "seed: 0" in (folder / "config.yaml").read_text()

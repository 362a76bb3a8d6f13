"""Checkpoints at a second place: copied in the background, kept by the run's rules, restored when its own are gone."""

import json
import shutil
import threading
import time

import fsspec
import pytest

from data_pipeline.corpus import file_systems
from model.locate import step_folder
from tests.documented import keys_and_types, quoted, table
from tests.runs import PATIENCE, TINY_RUN, run_script, run_train
from tests.train.checkpoints.held_files import HeldFileSystem
from tests.train.plain_runs import run_plainly, train_losses
from tests.train.test_documented_files import check_keys
from train.callbacks.base import Callback
from train.checkpoint import main
from train.checkpoints.layout import MARKER
from train.decisions import CONTINUE, Rollback
from train.run_directory import read_events


class InStep(Callback):
    """Lets the mirror have each checkpoint before the run goes on; `at`: step -> what is done then."""

    def __init__(self, at=None, waits=True):
        self._at, self._waits = dict(at or {}), waits

    def on_step_start(self, trainer):
        if trainer.step and self._waits:
            trainer.settle_save()
            trainer.settle_mirror(PATIENCE)
        decision = self._at.pop(trainer.step, lambda: None)()
        if decision is not None:
            trainer.wish(decision)


class Place:
    """A run below `folder`, its mirror, and what starts it."""

    def __init__(self, folder, corpus, *more):
        self.run = folder / "runs" / "run"
        self.mirror = folder / "mirror"
        self.overrides = [f"run_root={self.run.parent}", f"corpus.directory={corpus}", *TINY_RUN, "name=run"]
        self.overrides += ["parallel=zero0", "schedule=constant", "checkpoint.interval=1"]
        # Steps that cost little: checkpoints are what is looked at.
        self.overrides += ["training.sequence_length=8", "training.global_batch_size=2", "training.micro_batch_size=1"]
        self.overrides += ["evaluation.sets.validation.max_tokens=8"]
        self.overrides += [f"checkpoint.mirror={self.mirror}", *more]

    def start(self, steps, *more, callback=None):
        callbacks = [callback or InStep()]
        return run_plainly([*self.overrides, f"training.total_steps={steps}", *more], callbacks)

    def steps(self, at_mirror=True):
        root = (self.mirror / "run" if at_mirror else self.run) / "checkpoints"
        return sorted(int(path.name.removeprefix("step-")) for path in root.iterdir())

    def folder(self, step, at_mirror=True):
        return step_folder((self.mirror / "run" if at_mirror else self.run) / "checkpoints", step)

    def events(self, kind):
        """As docs/training.md has them."""
        rows = [row for row in table("training.md", "event") if quoted(row[0]) == [kind]]
        found = [event for event in read_events(self.run) if event["event"] == kind]
        for event in found:
            check_keys(event, keys_and_types(rows), {"time", "event"})
        return found


@pytest.fixture
def place(small_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(file_systems, "FIRST_WAIT_SECONDS", 0.001)
    yield Place(tmp_path, small_corpus)
    HeldFileSystem.release()


@pytest.fixture(scope="module")
def whole(small_corpus, tmp_path_factory):
    """Losses of a run of six steps that nothing interrupted."""
    found = Place(tmp_path_factory.mktemp("whole"), small_corpus, "checkpoint.mirror=null")
    assert found.start(6) == 0
    return train_losses(found.run)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_every_checkpoint_is_copied_and_old_ones_go_by_the_same_rules(place):
    def keep():
        assert main(["keep", f"{place.run}@1"]) == 0

    settings = ["checkpoint.keep_last=2", "checkpoint.mirror_keep_last=1", "checkpoint.keep_every=4"]
    assert place.start(6, *settings, callback=InStep({2: keep})) == 0
    assert place.steps(at_mirror=False) == [1, 4, 5, 6]
    assert place.steps() == [1, 4, 6]
    for step in place.steps():
        here = {name: data for name, data in content(place.folder(step, False)).items() if name != "kept.json"}
        assert content(place.folder(step)) == here
    copied = place.events("mirror")
    # The first had gone again when it was kept for good.
    assert [event["step"] for event in copied] == [1, 2, 3, 1, 4, 5, 6]
    assert copied[4]["checkpoint"] == "step-00000004" and copied[4]["seconds"] >= 0
    assert main(["verify", str(place.mirror / "run"), "--all"]) == 0


def test_a_run_whose_folder_is_lost_goes_on_from_the_mirror(place, whole, capsys):
    assert place.start(4) == 0
    shutil.rmtree(place.run)
    assert place.start(6) == 0
    said = capsys.readouterr().err
    assert f"Restored step-00000004 from the mirror {place.mirror}/run in " in said
    (restored,) = place.events("restore")
    assert (restored["step"], restored["checkpoint"]) == (4, "step-00000004")
    assert restored["mirror"] == f"{place.mirror}/run"
    assert place.events("resume")[0]["checkpoint"] == "step-00000004"
    assert train_losses(place.run) == {step: loss for step, loss in whole.items() if step > 4}
    assert place.steps()[-1] == 6 and not list((place.run / "checkpoints").glob("*.partial"))


@pytest.mark.long
def test_what_is_newer_at_the_mirror_is_taken_and_what_is_as_new_is_not(place, whole, capsys):
    assert place.start(4) == 0
    shutil.rmtree(place.folder(4, at_mirror=False))
    # A damaged one of its own is no reason to go back further.
    flip(place.folder(3, at_mirror=False) / "state.json")
    assert place.start(6) == 0
    assert [event["step"] for event in place.events("restore")] == [4]
    assert train_losses(place.run) == whole
    assert [event["checkpoint"] for event in place.events("reject")] == ["step-00000003"]
    assert place.start(7) == 0
    assert len(place.events("restore")) == 1


def test_a_damaged_copy_is_passed_over_and_the_one_before_is_taken(place, whole, capsys):
    assert place.start(4, "checkpoint.mirror_keep_last=4") == 0
    flip(place.folder(4) / "exp_avg" / "weights-00000.safetensors")
    (place.folder(3) / MARKER).unlink()
    shutil.rmtree(place.run)
    assert place.start(6, "checkpoint.on_corrupt=fail") == 1
    where = f"step-00000004 at {place.mirror}/run"
    problem = f"exp_avg/weights-00000.safetensors was altered: its checksum is not that of {MARKER}"
    assert f"train: {where}: {problem}. Restore it or delete it there" in capsys.readouterr().err
    assert place.start(6) == 0
    assert f"WARNING    {where} is passed over: {problem}" in capsys.readouterr().err
    assert place.events("reject")[-1]["checkpoint"] == "step-00000004"
    assert [event["step"] for event in place.events("restore")] == [2]
    assert train_losses(place.run) == {step: loss for step, loss in whole.items() if step > 2}


@pytest.mark.long
def test_a_run_does_not_begin_anew_where_the_mirror_has_something_that_it_cannot_use(place, capsys):
    assert place.start(2) == 0
    shutil.rmtree(place.run)
    for step in (1, 2):
        flip(place.folder(step) / "state.json")
    assert place.start(3) == 1
    assert f"no checkpoint at {place.mirror}/run can be restored" in capsys.readouterr().err
    assert place.steps(at_mirror=False) == []
    shutil.rmtree(place.mirror)
    place.mirror.write_text("a file")
    assert place.start(3) == 1
    said = capsys.readouterr().err
    assert f"checkpoint.mirror: {place.mirror}/run cannot be read (NotADirectoryError: " in said
    assert "set checkpoint.mirror=null to begin without" in said
    assert place.start(3, "checkpoint.mirror=null") == 0


def test_a_mirror_that_fails_is_told_of_and_tried_again_at_the_next_save(place, capsys):
    def spoil():
        place.mirror.write_text("a file")

    callback = InStep({0: spoil, 4: place.mirror.unlink})
    assert place.start(5, "checkpoint.keep_every=2", callback=callback) == 0
    failed = place.events("mirror_failed")
    assert [event["step"] for event in failed] == [1, 2, 3, 4]
    assert all(f"{place.mirror}/run: NotADirectoryError: " in event["problem"] for event in failed)
    assert [event["rule"] for event in place.events("alert")] == ["mirror_failed"] * 4
    assert "WARNING    " in capsys.readouterr().err
    # The newest first, then what is kept for good.
    assert [event["step"] for event in place.events("mirror")][:2] == [5, 4]
    assert place.steps() == [2, 4, 5]


@pytest.mark.long
def test_a_mirror_that_is_away_when_a_run_starts_keeps_it_from_nothing(place, capsys):
    assert place.start(2) == 0
    shutil.rmtree(place.mirror)
    place.mirror.write_text("a file")
    assert place.start(3, callback=InStep(waits=False)) == 0
    (first, *_) = place.events("mirror_failed")
    assert first["step"] == 2 and "The run's own checkpoints are untouched" in capsys.readouterr().err
    place.mirror.unlink()
    # A run that has nothing left to do copies nothing; one that goes on has its newest copied first.
    assert place.start(4) == 0
    assert [event["step"] for event in place.events("mirror")][-2:] == [3, 4]


def test_a_rollback_takes_its_checkpoints_from_the_mirror_too(place):
    back = {5: lambda: Rollback(2, None, "a test")}
    assert place.start(7, "checkpoint.keep_last=9", callback=InStep(back)) == 0
    events = [(event["event"], event.get("step")) for event in read_events(place.run)]
    assert ("rollback", 6) in events
    # Those of the steps 3 to 5 are others than before.
    assert [step for kind, step in events if kind == "mirror"] == [1, 2, 3, 4, 5, 3, 4, 5, 6, 7]
    assert not (place.run / "mirror_void.json").exists()
    for step in range(1, 8):
        assert content(place.folder(step)) == content(place.folder(step, at_mirror=False)), step


@pytest.mark.long
def test_what_was_given_up_is_not_restored_though_the_mirror_could_not_be_reached_then(place):
    away = place.mirror.with_name("away")

    def lose():
        place.mirror.rename(away)
        place.mirror.write_text("a file")
        return Rollback(2, None, "a test")

    class Ends(InStep):
        def on_rollback(self, trainer, rollback, left):
            raise ValueError("the end of the test")

    assert place.start(9, "checkpoint.keep_last=9", callback=Ends({5: lose})) == 1
    assert json.loads((place.run / "mirror_void.json").read_text()) == {"format_version": 1, "void_after": 2}
    place.mirror.unlink()
    away.rename(place.mirror)
    assert place.steps() == [1, 2, 3, 4, 5] and place.steps(at_mirror=False) == [1, 2]
    assert place.start(3) == 0
    assert place.events("resume")[-1]["step"] == 2 and place.events("restore") == []
    assert place.steps()[-1] == 3 and not (place.run / "mirror_void.json").exists()


def test_the_end_of_a_run_waits_for_the_last_copy_but_not_for_ever(place, tmp_path):
    HeldFileSystem.hold("step-0000000[2-4]/exp_avg_sq")
    held = [f"checkpoint.mirror=held://{place.mirror}", "checkpoint.mirror_seconds=0.5"]
    started = time.monotonic()
    # The loop does not wait at all: the second step is taken while the copy stands still.
    assert place.start(4, *held, callback=InStep(waits=False)) == 0
    assert HeldFileSystem.waits.is_set() and time.monotonic() - started < 100
    (failed,) = place.events("mirror_failed")
    assert (
        "does not have the last checkpoint yet, after 0.5 s; the next start goes on with the copy"
        in (failed["problem"])
    )
    HeldFileSystem.release()
    # It copies nothing behind the run's end.
    for thread in threading.enumerate():
        if thread.name == "checkpoint-mirror":
            thread.join(PATIENCE)
    assert not any((place.folder(step) / MARKER).exists() for step in place.steps() if step > 1)
    # The run is complete, and its next start copies what the mirror still lacks.
    assert place.start(4) == 0
    assert [event["step"] for event in place.events("mirror")][-1] == 4
    assert content(place.folder(4)) == content(place.folder(4, at_mirror=False))


@pytest.mark.long
def test_checkpoints_wait_for_their_copy_before_they_are_deleted(place):
    HeldFileSystem.hold("step-00000001/exp_avg_sq")

    class Releases(Callback):
        def on_step_end(self, trainer):
            trainer.settle_save()
            if trainer.step == 2:
                assert HeldFileSystem.waits.wait(PATIENCE)
            if trainer.step == 5:
                assert place.steps(at_mirror=False) == [1, 4]
                HeldFileSystem.release()
            return CONTINUE

    held = [f"checkpoint.mirror=held://{place.mirror}", "checkpoint.keep_last=1"]
    assert place.start(6, *held, callback=Releases()) == 0
    copied = [event["step"] for event in place.events("mirror")]
    # Of what waited, the newest alone.
    assert copied[0] == 1 and copied[-1] == 6 and not {2, 3} & set(copied)
    assert place.steps(at_mirror=False) == [6] and place.steps() == [6]


def test_a_url_of_any_file_system_will_do(place, whole):
    mirror = "checkpoint.mirror=memory://backup/of/runs"
    assert place.start(4, mirror) == 0
    system = fsspec.filesystem("memory")
    assert system.exists(f"/backup/of/runs/run/checkpoints/step-00000004/{MARKER}")
    shutil.rmtree(place.run)
    assert place.start(6, mirror) == 0
    assert place.events("restore")[0]["mirror"] == "memory://backup/of/runs/run"
    assert train_losses(place.run) == {step: loss for step, loss in whole.items() if step > 4}
    system.rm("/backup", recursive=True)


def test_a_checkpoint_at_a_url_is_brought_here_to_branch_from(place, whole, tmp_path, capsys):
    mirror = "memory://fetch/runs"
    assert place.start(4, f"checkpoint.mirror={mirror}", "checkpoint.mirror_keep_last=4") == 0
    fetched = tmp_path / "fetched"
    assert main(["fetch", mirror, "run@3", "--output", str(fetched)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(fetched / "checkpoints" / "step-00000003")
    assert main(["verify", str(fetched)]) == 0
    more = ["name=branch", f"resume_from={fetched}", "checkpoint.mirror=null"]
    assert place.start(6, *more) == 0
    branch = train_losses(place.run.parent / "branch")
    assert branch == {step: loss for step, loss in whole.items() if step > 3}
    assert main(["fetch", mirror, "run", "--output", str(fetched)]) == 0
    assert sorted(path.name for path in (fetched / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    fsspec.filesystem("memory").rm("/fetch", recursive=True)


def test_what_cannot_be_fetched_is_named_and_leaves_nothing(place, tmp_path, capsys):
    assert place.start(2) == 0
    fetched = tmp_path / "fetched"

    def refused(code, *arguments):
        assert main(["fetch", *arguments, "--output", str(fetched)]) == code
        return capsys.readouterr().err

    assert "run has no complete checkpoint of 7 steps, but of 1, 2" in refused(2, str(place.mirror), "run@7")
    assert "other has no complete checkpoint" in refused(2, str(place.mirror), "other")
    assert "run@newest: name a run, or RUN@STEP" in refused(2, str(place.mirror), "run@newest")
    assert "nonsense://x: Protocol not known" in refused(2, "nonsense://x", "run")
    (shard,) = (place.folder(2) / "weights").glob("*.safetensors")
    flip(shard)
    assert "was altered" in refused(1, str(place.mirror), "run")
    assert not list((fetched / "checkpoints").iterdir())
    text = refused(1, "ftp://me:geheim@127.0.0.1:9/x", "run")
    assert "ftp://me:***@127.0.0.1:9/x/run: " in text and "geheim" not in text


def test_a_password_is_shown_nowhere(place, capsys):
    assert place.start(2, "checkpoint.mirror=null") == 0
    # Nobody listens there.
    assert place.start(3, "checkpoint.mirror=ftp://me:geheim@127.0.0.1:9/x", callback=InStep(waits=False)) == 0
    assert place.events("mirror_failed")[0]["problem"].startswith("ftp://me:***@127.0.0.1:9/x/run: ")
    written = "".join(path.read_text(errors="replace") for path in place.run.rglob("*") if path.is_file())
    assert "geheim" not in written + capsys.readouterr().err
    with pytest.raises(ValueError, match=r"ftp://me:\*\*\*@127.0.0.1:9/x: its password was not kept"):
        place.start(4, "checkpoint.mirror=ftp://me:***@127.0.0.1:9/x")


def test_what_cannot_be_a_mirror_is_refused(place):
    settings = ["checkpoint.mirror=' '", "checkpoint.mirror_keep_last=0", "checkpoint.mirror_seconds=1800"]
    with pytest.raises(ValueError) as error:
        place.start(1, *settings)
    found = str(error.value)
    assert "checkpoint.mirror: empty; name a folder or a URL, or set it to null" in found
    assert "checkpoint.mirror_keep_last: must be at least 1 (0)" in found
    assert "checkpoint.mirror_seconds: must be below parallel.collective_timeout_seconds=1800" in found
    with pytest.raises(ValueError, match=r"checkpoint.mirror: nonsense://x cannot be opened \(Protocol not known"):
        place.start(1, "checkpoint.mirror=nonsense://x")
    with pytest.raises(ValueError, match="is run_root, where the run's checkpoints are themselves"):
        place.start(1, f"checkpoint.mirror={place.run.parent}")


@pytest.mark.long
def test_a_branch_begins_from_a_mirror_that_is_a_path(place, whole):
    assert place.start(3) == 0
    shutil.rmtree(place.run)
    more = ["name=branch", f"resume_from={place.mirror / 'run'}@3", "checkpoint.mirror=null"]
    assert place.start(5, *more) == 0
    found = train_losses(place.run.with_name("branch"))
    assert found == {4: whole[4], 5: whole[5]}


# A run that is killed while it copies a file of a checkpoint to or from the mirror, which has that of step 2.
KILLED = """
import os, sys, threading
from conf import compose
from tests.runs import PATIENCE
from tests.train.checkpoints.held_files import HeldFileSystem
from train.__main__ import end_process
from train.callbacks.base import Callback
from train.config import RunConfig
from train.run import train

class Waits(Callback):
    def on_step_start(self, trainer):
        if trainer.step == 2:
            trainer.settle_save()
            trainer.settle_mirror(PATIENCE)

def kill():
    HeldFileSystem.waits.wait()
    os.kill(os.getpid(), 9)

pattern, mode, *overrides = sys.argv[1:]
HeldFileSystem.hold(pattern, mode)
threading.Thread(target=kill, daemon=True).start()
end_process(train(compose(RunConfig, "train", overrides), [Waits()]))
"""


@pytest.mark.slow
def test_a_copy_that_is_killed_counts_for_nothing_and_two_ranks_restore_the_one_before(tiny_run, tmp_path):
    mirror = tmp_path / "mirror"
    run = [*tiny_run[1:], "parallel=zero1", "schedule=constant", "schedule.warmup=0", "checkpoint.interval=2"]
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    long = [*run, "name=run", "training.total_steps=400", f"checkpoint.mirror=held://{mirror}"]
    killed = run_script(script, ["step-(?!00000002)[0-9]+/exp_avg_sq", "wb", *long], processes=2)
    assert killed.returncode != 0
    root = mirror / "run" / "checkpoints"
    whole, torn = sorted(root.iterdir())
    assert whole.name == "step-00000002" and (whole / MARKER).exists()
    assert (torn / "exp_avg").is_dir() and not (torn / MARKER).exists()
    shutil.rmtree(tmp_path / "run")
    # Killed once more, while it is brought back.
    killed = run_script(script, ["step-00000002/weights/weights-00001", "rb", *long], processes=2)
    assert killed.returncode != 0
    (staged,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert staged.suffix == ".partial" and (staged / MARKER).exists()
    settings = [*run, "name=run", "training.total_steps=6", f"checkpoint.mirror={mirror}"]
    done = run_train(settings, processes=2)
    assert done.returncode == 0, done.stderr
    assert "Restored step-00000002 from the mirror" in done.stderr
    assert sorted(path.name for path in root.iterdir())[-1] == "step-00000006"
    assert main(["verify", str(mirror / "run"), "--all"]) == 0
    whole = run_train([*run, "name=whole", "training.total_steps=6"], processes=2)
    assert whole.returncode == 0, whole.stderr
    expected = {step: loss for step, loss in train_losses(tmp_path / "whole").items() if step > 2}
    assert train_losses(tmp_path / "run") == expected


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_go_on_without_a_mirror_that_fails(tiny_run, tmp_path):
    run = [*tiny_run, "parallel=zero1", "checkpoint.interval=2"]
    assert run_train([*run, "training.total_steps=2"], processes=2).returncode == 0
    (tmp_path / "mirror").write_text("a file")
    done = run_train([*run, "training.total_steps=6", f"checkpoint.mirror={tmp_path / 'mirror'}"], processes=2)
    assert done.returncode == 0, done.stderr
    failed = [event for event in read_events(tmp_path / "run") if event["event"] == "mirror_failed"]
    assert len(failed) >= 2 and failed[0]["step"] == 2 and failed[-1]["step"] == 6
    assert not (tmp_path / "run" / "logs" / "rank-00001.end.json").exists()

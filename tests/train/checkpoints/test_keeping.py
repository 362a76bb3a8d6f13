"""Checkpoints that a user keeps for good: `python -m train.checkpoint`, and what deletes all others."""

import json
import threading
from types import SimpleNamespace

import pytest

from conf import ConfigError
from tests.runs import TINY_RUN
from tests.train.plain_runs import run_plainly
from train.callbacks.base import Callback
from train.checkpoint import main
from train.checkpoints.layout import (
    begin_staging,
    deciding_what_stays,
    is_kept,
    keep,
    mark_complete,
    put_in_place,
    remove_after,
)
from train.decisions import CONTINUE
from train.evaluate import EvaluationResult
from train.interpreter import python_name
from train.length import last_phase_begins_now
from train.parallel.fragments import MOMENTS
from train.schedule import ScheduleConfig, last_phase_begins

ATTEMPT = "0123456789ab"


def names(root):
    return sorted(path.name for path in root.iterdir())


def save_anew(folder):
    staged = begin_staging(folder, ATTEMPT, ("weights", *MOMENTS))
    assert staged.name == f"{folder.name}.{ATTEMPT}.partial" and (staged / "exp_avg").is_dir()
    mark_complete(staged, ATTEMPT, {})
    put_in_place(staged, folder)
    assert not staged.exists()


@pytest.fixture
def run(tmp_path):
    """The folder of a run with three complete checkpoints and a torn one."""
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (2, 4, 6, 8):
        (checkpoints / f"step-{step:08d}" / "weights").mkdir(parents=True)
        if step < 8:
            (checkpoints / f"step-{step:08d}" / "complete.json").write_text("{}")
    return tmp_path / "run"


class Scores(Callback):
    """Held-out losses as a test wants them: step -> loss."""

    def __init__(self, losses):
        self._losses = losses

    def on_step_end(self, trainer):
        if (loss := self._losses.get(trainer.step)) is not None:
            trainer.dispatch("on_evaluation", {"validation": EvaluationResult(loss, 1.0, 1)})
        return CONTINUE


def steps(checkpoints):
    return [int(name.removeprefix("step-")) for name in names(checkpoints)]


def test_the_best_checkpoint_by_a_held_out_set_stays_until_a_better_one_is_there(small_corpus, tmp_path):
    overrides = [f"run_root={tmp_path}", f"corpus.directory={small_corpus}", *TINY_RUN, "name=run", "schedule=constant"]
    overrides += ["checkpoint.interval=2", "checkpoint.keep_last=1", "checkpoint.keep_best=validation"]
    overrides += ["parallel=zero0", "evaluation.sets.validation.max_tokens=32"]
    checkpoints = tmp_path / "run" / "checkpoints"
    # Step 5 is the best of all and has no checkpoint.
    scores = Scores({2: 4.0, 4: 3.0, 5: 1.0, 6: 3.5, 8: 3.2, 10: 2.0, 12: 2.5})
    for length, expected in ((6, [4, 6]), (9, [4, 9]), (13, [10, 13])):
        assert run_plainly([*overrides, f"training.total_steps={length}"], [scores]) == 0
        # The set is really scored at the end of the run as well, and is worse there.
        assert steps(checkpoints) == expected


def test_the_last_phase_of_a_schedule_begins_with_a_checkpoint_that_stays(small_corpus, tmp_path):
    overrides = [f"run_root={tmp_path}", f"corpus.directory={small_corpus}", *TINY_RUN, "name=run", "schedule=wsd"]
    overrides += ["schedule.warmup=1", "schedule.decay=4", "checkpoint.interval=3", "checkpoint.keep_last=1"]
    overrides += ["parallel=zero0"]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert run_plainly([*overrides, "training.total_steps=12"]) == 0
    assert steps(checkpoints) == [8, 12]
    # Extended: the decay begins once more, later.
    assert run_plainly([*overrides, "training.total_steps=20"]) == 0
    assert steps(checkpoints) == [8, 16, 20]
    without = [*overrides, "name=without", "training.total_steps=12", "checkpoint.keep_before_decay=false"]
    assert run_plainly(without) == 0
    assert steps(tmp_path / "without" / "checkpoints") == [12]


def test_checkpoints_of_named_steps_are_written_and_stay(small_corpus, tmp_path):
    overrides = [f"run_root={tmp_path}", f"corpus.directory={small_corpus}", *TINY_RUN, "name=run", "schedule=constant"]
    overrides += ["checkpoint.interval=3", "checkpoint.keep_last=1", "parallel=zero0", "training.total_steps=9"]
    assert run_plainly([*overrides, "checkpoint.keep_at=[2,5]"]) == 0
    assert steps(tmp_path / "run" / "checkpoints") == [2, 5, 9]
    with pytest.raises(ConfigError, match=r"checkpoint.keep_at: must be at least 1 \(0\)"):
        run_plainly([*overrides, "name=other", "checkpoint.keep_at=[0]"])


@pytest.mark.parametrize(
    ("settings", "begins"),
    [
        ({"kind": "wsd", "decay": 0.25, "decay_shape": "linear"}, 75),
        ({"kind": "cosine", "cooldown": 10}, 90),
        ({"kind": "cosine"}, None),
        ({"kind": "constant", "final_factor": None}, None),
    ],
)
def test_where_the_last_phase_of_a_schedule_begins(settings, begins):
    assert last_phase_begins(ScheduleConfig(**settings), 100) == begins


def test_the_last_phase_of_a_run_in_tokens_begins_at_their_count():
    """Steps of 100 tokens for a schedule that counts steps of 60: 6,000 of 10,000 tokens are passed in step 60."""
    config = SimpleNamespace(
        schedule=ScheduleConfig(kind="wsd", decay=0.4, decay_shape="linear"),
        training=SimpleNamespace(total_tokens=10_000),
        tokens_per_step=100,
    )
    begun = []
    for step in range(1, 101):
        state = SimpleNamespace(applied_tokens=100 * step, schedule_step_tokens=60)
        begun += [step] if last_phase_begins_now(config, state) else []
    # The schedule has 167 steps of 60 tokens, of which 67 are the decay: it begins at 6,000 tokens.
    assert begun == [60]


def test_a_kept_checkpoint_outlives_pruning_until_it_is_released(small_corpus, tmp_path, capsys):
    overrides = [f"run_root={tmp_path}", f"corpus.directory={small_corpus}", *TINY_RUN, "name=run", "schedule=constant"]
    overrides += ["checkpoint.interval=1", "checkpoint.keep_last=1", "parallel=zero0"]
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    assert run_plainly([*overrides, "training.total_steps=1"]) == 0
    assert main(["keep", f"{run}@1"]) == 0
    assert (
        f"`{python_name()} -m train.checkpoint release {checkpoints}/step-00000001` undoes it"
        in capsys.readouterr().out
    )
    assert run_plainly([*overrides, "training.total_steps=3"]) == 0
    assert names(checkpoints) == ["step-00000001", "step-00000003"]
    assert main(["list", str(run)]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.split()[0] == "1" and first.endswith("kept")
    assert second.split()[0] == "3" and not second.endswith("kept")
    assert main(["release", f"{run}@1"]) == 0
    assert run_plainly([*overrides, "training.total_steps=4"]) == 0
    assert names(checkpoints) == ["step-00000004"]


def test_the_commands_name_what_does_not_exist_and_change_nothing_then(run, tmp_path, capsys):
    assert main(["keep", f"{run}@2", f"{run}@3", f"{run}@8", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "step-00000003 does not exist; the complete ones there are of the steps 2, 4, 6" in error
    assert "step-00000008 is no complete checkpoint" in error
    assert f"{tmp_path} is nothing with weights" in error
    assert not any(is_kept(folder) for folder in (run / "checkpoints").iterdir())
    assert main(["list", str(run)]) == 0
    assert "incomplete" in capsys.readouterr().out.splitlines()[-1]
    assert main(["list", str(tmp_path)]) == 2
    assert "no run's directory" in capsys.readouterr().err
    for arguments in ([], ["keep"], ["delete", str(run)]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2


def test_without_a_step_the_newest_is_kept(run):
    assert main(["keep", str(run), str(run / "checkpoints" / "step-00000002")]) == 0
    assert [is_kept(run / "checkpoints" / f"step-0000000{step}") for step in (2, 4, 6)] == [True, False, True]


def test_a_rollback_sets_a_kept_checkpoint_aside_and_no_start_takes_it_up(run):
    root = run / "checkpoints"
    for _ in range(2):
        keep(root / "step-00000006")
        assert remove_after(root, 4)[0] == "step-00000006"
        save_anew(root / "step-00000006")
    aside = ["set-aside-2-step-00000006", "set-aside-step-00000006"]
    assert names(root) == [*aside, "step-00000002", "step-00000004", "step-00000006"]
    assert (root / aside[1] / "complete.json").exists()


def test_a_checkpoint_that_is_written_again_stays_kept(run):
    folder = run / "checkpoints" / "step-00000004"
    keep(folder)
    since = (folder / "kept.json").read_bytes()
    save_anew(folder)
    assert is_kept(folder) and (folder / "kept.json").read_bytes() == since
    assert json.loads((folder / "complete.json").read_text()) == {"format_version": 1, "attempt": ATTEMPT, "files": {}}
    save_anew(run / "checkpoints" / "step-00000006")
    assert not is_kept(run / "checkpoints" / "step-00000006")


def test_keeping_waits_for_a_deletion_under_way(run, capsys):
    """And then does not say that it keeps what is gone."""
    root, codes = run / "checkpoints", []
    with deciding_what_stays(root):
        keeper = threading.Thread(target=lambda: codes.append(main(["keep", f"{run}@2"])))
        keeper.start()
        keeper.join(timeout=0.3)
        assert keeper.is_alive() and not is_kept(root / "step-00000002")
        (root / "step-00000002" / "complete.json").unlink()
    keeper.join()
    assert codes == [2] and not is_kept(root / "step-00000002")
    assert "has just been deleted by its run" in capsys.readouterr().err

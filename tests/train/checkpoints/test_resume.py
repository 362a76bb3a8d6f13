"""Kill and start again: nothing is lost, nothing is repeated, not a bit differs."""

import json
import random
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from model.locate import complete_checkpoints
from tests.runs import (
    PATIENCE,
    PAUSED,
    ROOT,
    environment,
    fork_server,
    paused_train_command,
    run_script,
    run_train,
    train_command,
)
from train.checkpoints.layout import MARKER, describe_file, remove_torn

STEPS = 24


def lines_of(run_directory, name="metrics.jsonl"):
    return [json.loads(line) for line in (run_directory / name).read_text().splitlines()]


def losses(run_directory):
    """{step: (loss, gradient norm, learning rate)} of the logged steps, and every held-out loss."""
    lines = lines_of(run_directory)
    train = [(x["step"], x["loss"], x["grad_norm"], x["learning_rate"]) for x in lines if x["kind"] == "train"]
    return train + [(x["step"], x["set"], x["loss"]) for x in lines if x["kind"] == "evaluation"]


def events(run_directory, kind):
    return [event for event in lines_of(run_directory, "events.jsonl") if event["event"] == kind]


def start_and_kill_at(overrides, run_directory, step):
    """Start two ranks, wait until metrics.jsonl has `step` and a checkpoint counts, then SIGKILL both.

    They do not end by themselves: they stand still before the last steps, until then.
    """
    never = run_directory.with_name("never")
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(run_script, PAUSED, [str(STEPS - 4), str(never), *overrides], processes=2)
        try:
            while not (
                has_step(run_directory / "metrics.jsonl", step) and complete_checkpoints(run_directory / "checkpoints")
            ):
                assert not run.done(), run.result().stderr
                time.sleep(0.01)
            ranks = psutil.Process(fork_server().pid).children()
            assert len(ranks) == 2
            for rank in ranks:
                rank.kill()
        finally:
            never.touch()
    assert run.result().returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "compiles"),
    [
        (1, "null"),
        pytest.param(2, "null", marks=pytest.mark.long),
        (3, "null"),
        pytest.param(1, "true", marks=pytest.mark.layouts),
    ],
)
def test_sigkill_at_a_random_step_leaves_no_trace(stage, compiles, tiny_run, tmp_path):
    overrides = [
        *tiny_run[1:],
        f"parallel=zero{stage}",
        f"training.compile={compiles}",
        f"training.total_steps={STEPS}",
        "checkpoint.interval=3",
        "evaluation.interval=6",
        "logging.monitor_interval=4",
    ]
    whole = run_train(["name=whole", *overrides], processes=2)
    assert whole.returncode == 0, whole.stderr

    # Generated at run time, so that every run of the suite tries another step; printed when the test fails.
    step = random.Random().randint(4, STEPS - 6)
    print(f"killed at step {step}")
    start_and_kill_at(["name=killed", *overrides], tmp_path / "killed", step)
    again = run_train(["name=killed", *overrides], processes=2)
    assert again.returncode == 0, again.stderr

    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    (resume,) = events(tmp_path / "killed", "resume")
    assert resume["step"] > 0
    assert resume["next_sample"] == resume["step"] * 8


@pytest.mark.slow
def test_a_checkpoint_loads_under_another_stage_world_and_precision_of_work(tiny_run, tmp_path):
    """The same data order, losses equal to rounding."""
    overrides = [*tiny_run[1:], f"training.total_steps={STEPS}", "checkpoint.interval=8"]
    whole = run_train(["name=whole", *overrides])
    assert whole.returncode == 0, whole.stderr
    for number, (stage, processes) in enumerate([(3, 2), (0, 1), (2, 2), (1, 1)]):
        name = f"moved{number}"
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        config = tmp_path / name / "config.yaml"
        config.write_text(config.read_text().replace("name: whole", f"name: {name}"))
        for step in (16, 24):
            shutil.rmtree(tmp_path / name / "checkpoints" / f"step-{step:08d}")
        done = run_train([f"name={name}", *overrides, f"parallel=zero{stage}"], processes=processes)
        assert done.returncode == 0, done.stderr
        expected = {x["step"]: x["loss"] for x in lines_of(tmp_path / "whole") if x["kind"] == "train"}
        got = {x["step"]: x["loss"] for x in lines_of(tmp_path / name) if x["kind"] == "train"}
        assert expected.keys() == got.keys()
        assert max(abs(expected[s] - got[s]) for s in expected) <= 1e-5
        assert events(tmp_path / name, "resume")[0]["step"] == 8


def has_step(metrics, step):
    return metrics.exists() and f'"step": {step},' in metrics.read_text()


def wait_for_step(process, metrics, step):
    while not has_step(metrics, step):
        assert process.poll() is None
        time.sleep(0.02)


@pytest.mark.slow
def test_a_complete_run_says_so_and_sigterm_stops_with_a_checkpoint(tiny_run, tmp_path):
    overrides = [*tiny_run, "training.total_steps=4000"]
    process = subprocess.Popen(
        train_command(overrides), env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for_step(process, tmp_path / "run" / "metrics.jsonl", 3)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert "Stopped by SIGTERM" in stderr
    (stop,) = events(tmp_path / "run", "stop")
    assert (tmp_path / "run" / "checkpoints" / f"step-{stop['step']:08d}" / "complete.json").exists()

    shorter = [*tiny_run, f"training.total_steps={stop['step']}"]
    again = run_train(shorter)
    assert again.returncode == 0
    assert "is complete" in again.stderr


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_is_named(tiny_run, tmp_path):
    overrides = [*tiny_run, "training.total_steps=4000"]
    process = psutil.Popen(
        train_command(overrides, processes=2), env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    wait_for_step(process, tmp_path / "run" / "metrics.jsonl", 3)
    (rank_1,) = [child for child in process.children(recursive=True) if child.environ().get("RANK") == "1"]
    rank_1.send_signal(signal.SIGUSR1)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    assert "Stopped by SIGUSR1" in stderr
    assert events(tmp_path / "run", "stop")[0]["reason"] == "SIGUSR1"


@pytest.mark.slow
def test_signals_that_keep_coming_do_not_tear_the_last_checkpoint(tiny_run, tmp_path):
    # Wide enough for the write to take some time.
    wide = ["model.d_model=256", "model.ffn_dim=2048", "training.sequence_length=16"]
    process = subprocess.Popen(
        train_command([*tiny_run, *wide, "training.total_steps=10000"]), env=environment(), cwd=ROOT
    )
    wait_for_step(process, tmp_path / "run" / "metrics.jsonl", 2)
    checkpoints = tmp_path / "run" / "checkpoints"
    while process.poll() is None and not any(checkpoints.glob("*/complete.json")):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    process.wait(timeout=PATIENCE)
    assert any(checkpoints.glob("*/complete.json"))


SLOW_DISK = """
import sys, time
from train.__main__ import end_process, main
from train.checkpoints.writer import _Snapshot

write = _Snapshot.write

def slow_write(self, *arguments):
    time.sleep(3)
    return write(self, *arguments)

_Snapshot.write = slow_write
end_process(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_failed_run_finishes_the_checkpoint_that_it_is_writing(processes, tiny_run, tmp_path):
    (tmp_path / "slow_disk.py").write_text(SLOW_DISK)
    diverging = ["optimizer.learning_rate=1e30", "schedule.warmup=0", "training.max_skipped_steps=1"]
    overrides = [*tiny_run, *diverging, "training.total_steps=10", "checkpoint.interval=1"]
    failed = run_script(tmp_path / "slow_disk.py", overrides, processes)
    assert failed.returncode == 1
    assert "training.max_skipped_steps" in failed.stderr
    written = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(written) > 1 and all((folder / MARKER).is_file() for folder in written), written


@pytest.mark.slow
def test_a_run_goes_on_when_wandb_dies(tiny_run, tmp_path):
    overrides = [*tiny_run, "training.total_steps=60", "logging.wandb.mode=offline"]
    command = paused_train_command(2, tmp_path / "go on", overrides)
    process = psutil.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for_step(process, tmp_path / "run" / "metrics.jsonl", 2)
    for service in process.children(recursive=True):
        service.kill()
    (tmp_path / "go on").touch()
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    assert stderr.count("W&B has failed (") == 1 and "the run goes on without it" in stderr
    assert losses(tmp_path / "run")[-2][0] == 60


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_named(tiny_run, tmp_path):
    overrides = [*tiny_run, "training.total_steps=9", "checkpoint.interval=3"]
    assert run_train(overrides).returncode == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    expected = losses(tmp_path / "run")

    # The newest: one flipped bit. A torn one beside it: no marker.
    weights = checkpoints / "step-00000009" / "weights" / "weights-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    torn = checkpoints / "step-00000008"
    (torn / "weights").mkdir(parents=True)
    again = run_train(overrides)
    assert again.returncode == 0, again.stderr
    (rejected,) = events(tmp_path / "run", "reject")
    assert "was altered" in rejected["problem"]
    assert not torn.exists()
    assert losses(tmp_path / "run") == expected
    assert events(tmp_path / "run", "resume")[0]["step"] == 6

    # The damaged one again, in a run that will not write over it: it does not push out those that are whole.
    weights.write_bytes(content)
    shorter = [*overrides, "training.total_steps=8", "checkpoint.interval=1", "checkpoint.keep_last=2"]
    assert run_train(shorter).returncode == 0
    assert [folder.name for folder in sorted(checkpoints.iterdir())] == [f"step-0000000{n}" for n in (7, 8, 9)]

    # Whole, but the state is of another version: refused, not guessed at.
    state = checkpoints / "step-00000008" / "state.json"
    content = state.read_text()
    state.write_text(content.replace('"format_version": 1', '"format_version": 2, "new": 0'))
    marker = json.loads((state.parent / "complete.json").read_text())
    marker["files"]["state.json"] = describe_file(state)
    (state.parent / "complete.json").write_text(json.dumps(marker))
    newer = run_train(shorter)
    assert newer.returncode == 2
    assert f"{state} has format_version 2; this version of xlstm-pretrain reads 1" in newer.stderr

    # All damaged: refused, exit code 1, every one named.
    for folder in checkpoints.glob("step-*"):
        (folder / "state.json").write_text("{}")
    failed = run_train(overrides)
    assert failed.returncode == 1
    for step in (7, 8, 9):
        assert f"step-{step:08d}" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.slow
def test_another_model_or_corpus_under_the_same_name_is_refused(tiny_run, tmp_path):
    overrides = [*tiny_run, "training.total_steps=2"]
    assert run_train(overrides).returncode == 0
    changed = run_train([*overrides, "model.logit_soft_cap=20.0", "seed=5"])
    assert changed.returncode == 2
    assert "model.logit_soft_cap:" in changed.stderr and "logit_soft_cap=30.0" in changed.stderr
    assert "seed:" in changed.stderr
    # How the same is computed may change: the check of the kernels advises it.
    faster = ["model.mlstm.backend=reference", "model.mlstm.reference_chunk_size=8", "training.total_steps=3"]
    resumed = run_train([*tiny_run, *faster])
    assert resumed.returncode == 0, resumed.stderr
    assert events(tmp_path / "run", "resume")[0]["step"] == 2


def test_folders_that_a_user_keeps_beside_the_checkpoints_are_left_alone(tmp_path):
    for name in ("step-00000002", "step-00000002.good", "step-00000004", "step-notes"):
        (tmp_path / name).mkdir()
    for name in ("step-00000002", "step-00000002.good"):
        (tmp_path / name / MARKER).touch()
    assert complete_checkpoints(tmp_path) == [tmp_path / "step-00000002"]
    assert remove_torn(tmp_path) == ["step-00000004"]
    assert (tmp_path / "step-notes").is_dir()

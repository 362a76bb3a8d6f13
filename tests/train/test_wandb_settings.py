"""Weights & Biases at the start of a run: what is refused beforehand, which mode holds, and a server out of reach."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import wandb

from tests.runs import reserved_port, run_train
from train.config import WandbConfig
from train.run_directory import read_events
from train.wandb_settings import validate_wandb, wandb_mode, wandb_variable_problems

KEY = "a" * 40


@pytest.mark.parametrize(
    "project", ["xlstm", "a b.c-d_e", "\u00e9", "a" * 128, "a" * 129, *(f"a{character}b" for character in "/\\#?%:")]
)
def test_project_names_are_judged_as_w_and_b_judges_them(project: str) -> None:
    try:
        wandb.Settings(project=project)
        allowed = True
    except (ValueError, wandb.errors.UsageError):
        allowed = False
    assert (validate_wandb(WandbConfig(project=project), "w") == []) == allowed


@pytest.mark.parametrize("tag", ["", "a", "a b/c:d", "a" * 64, "a" * 65])
def test_tags_are_judged_as_w_and_b_judges_them(tag: str) -> None:
    try:
        wandb.Settings(run_tags=("fine", tag))
        allowed = True
    except (ValueError, wandb.errors.UsageError):
        allowed = False
    assert (validate_wandb(WandbConfig(tags=["fine", tag]), "w") == []) == allowed


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": KEY}, "online"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": ""}, "online"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_MODE": "online"}, "online"),
    ],
)
def test_mode_auto_follows_the_environment_and_other_modes_do_not(variables: dict[str, str], mode: str) -> None:
    assert wandb_mode(WandbConfig(mode="auto"), variables) == mode
    for chosen in ("offline", "online", "disabled"):
        assert wandb_mode(WandbConfig(mode=chosen), variables) == chosen


def test_variables_that_w_and_b_does_not_know_are_refused() -> None:
    wrong = {"WANDB_MODE": "of", "WANDB_INIT_TIMEOUT": "soon"}
    mode, seconds = wandb_variable_problems(WandbConfig(mode="auto"), wrong)
    assert mode.startswith("environment variable WANDB_MODE: no such mode ('of'); choose one of online, run, offline")
    assert seconds == "environment variable WANDB_INIT_TIMEOUT: must be a positive number of seconds ('soon')"
    assert wandb_variable_problems(WandbConfig(mode="offline"), {"WANDB_MODE": "of"}) == []
    assert wandb_variable_problems(WandbConfig(mode="auto"), {"WANDB_MODE": "disabled"}) == []


# The process that W&B keeps beside a run waits up to half a minute at its end to report about itself.
SILENT_ABOUT_ITSELF = {"WANDB_ERROR_REPORTING": "false"}


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "answers"), [("auto", True), ("online", False)], ids=["silent", "refused"])
def test_a_run_that_cannot_reach_w_and_b_goes_on_offline(
    tmp_path: Path, tiny_run: list[str], mode: str, answers: bool
) -> None:
    with socket.socket() as silent, reserved_port() as closed:
        # Takes connections and never says a word.
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        port = silent.getsockname()[1] if answers else closed
        variables = {
            "WANDB_API_KEY": KEY,
            "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
            "WANDB_INIT_TIMEOUT": "4",
        }
        overrides = [*tiny_run, "training.total_steps=2", f"logging.wandb.mode={mode}"]
        done = run_train(overrides, **SILENT_ABOUT_ITSELF, **variables)
    folder = tmp_path / "run"
    assert done.returncode == 0, done.stderr
    assert "W&B was not reached (" in done.stderr and "the run goes on offline" in done.stderr
    assert f"wandb sync {folder / 'wandb'}/offline-run-*" in done.stderr
    [event] = [event for event in read_events(folder) if event["event"] == "wandb_offline"]
    assert event.keys() == {"time", "event", "step", "reason"}
    assert event["step"] == 0 and event["reason"]
    run_id = (folder / "wandb_id.txt").read_text().strip()
    [written] = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert written.name == f"run-{run_id}.wandb"
    assert written.stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("wandb_mode", ["offline", "disabled"])
def test_the_environments_mode_holds_with_a_key_and_without_a_server(
    tmp_path: Path, tiny_run: list[str], wandb_mode: str
) -> None:
    variables = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": wandb_mode}
    done = run_train([*tiny_run, "training.total_steps=2", "logging.wandb.mode=auto"], **variables)
    assert done.returncode == 0, done.stderr
    assert "W&B" not in done.stderr
    found = list((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))
    assert len(found) == (wandb_mode == "offline")


@pytest.mark.slow
def test_a_key_that_w_and_b_refuses_ends_the_run_at_its_start(tiny_run: list[str]) -> None:
    variables = {"WANDB_API_KEY": "short", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    overrides = [*tiny_run, "training.total_steps=2", "logging.wandb.mode=auto"]
    done = run_train(overrides, **SILENT_ABOUT_ITSELF, **variables)
    assert done.returncode == 1, done.stderr
    assert "logging.wandb.mode: W&B cannot start in mode 'online'" in done.stderr
    assert "correct WANDB_API_KEY" in done.stderr

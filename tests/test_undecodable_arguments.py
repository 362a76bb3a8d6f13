"""Texts on a command line that are no UTF-8: every command says so before it does anything."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conf import ConfigError, compose
from data_pipeline.__main__ import main as data_command
from launch.__main__ import main as launch_command
from model.__main__ import main as model_command
from tests.runs import PATIENCE, ROOT, environment
from train.__main__ import main as train_command
from train.config import RunConfig
from train.report import main as report_command

# As Python hands on an argument of other bytes.
CAFE = os.fsdecode(b"caf\xe9")
REASON = "caf\\xe9: holds bytes that are no UTF-8; give the text, or name the file, in UTF-8"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (model_command, ["generate", "checkpoint=here", f"prompt={CAFE}"]),
        (model_command, ["generate", f"checkpoint={CAFE}"]),
        (model_command, ["generate", "checkpoint=here", "prompt=a", f"tokenizer={CAFE}"]),
        (model_command, ["export", "checkpoint=here", f"output={CAFE}"]),
        (model_command, ["import", "source=here", f"output={CAFE}"]),
        (model_command, ["describe", f"model={CAFE}"]),
        (model_command, ["describe", "--device", CAFE]),
        (data_command, ["prepare", "output=out", f"data.path={CAFE}"]),
        (data_command, ["prepare", f"output={CAFE}"]),
        (data_command, ["inspect", CAFE]),
        (data_command, ["verify", CAFE]),
        (data_command, ["merge", "a", "b", "--output", CAFE]),
        (data_command, ["split", "a", "--output", "b", "--source", CAFE]),
        (train_command, ["corpus.directory=a", "training.total_steps=1", f"name={CAFE}"]),
        (train_command, ["corpus.directory=a", "training.total_steps=1", "name=b", f"logging.wandb.tags=[{CAFE}]"]),
        (launch_command, ["local", "corpus.directory=a", "training.total_steps=1", f"name={CAFE}"]),
        (launch_command, ["demo", f"name={CAFE}"]),
        (launch_command, ["sweep", "collect", CAFE, "--output", "a"]),
        (launch_command, ["sweep", "fit", "a", "--output", CAFE]),
        (launch_command, ["sweep", "fit", "a", "--output", "b", "--column", f"loss={CAFE}"]),
        (launch_command, ["sweep", "predict", CAFE, "--flops", "1e20"]),
        (report_command, [CAFE]),
    ],
)
def test_every_command_refuses_text_that_is_no_utf_8(
    command: Callable[[list[str]], int],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(arguments) == 2
    printed = capsys.readouterr()
    assert REASON.partition(": ")[2] in printed.err and "caf\\xe9" in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("override", [f'name="{CAFE}"', f"name='{CAFE}'", f"corpus.weights={{{CAFE}: 1.0}}"])
def test_quotes_do_not_hide_text_that_is_no_utf_8(override: str) -> None:
    with pytest.raises(ConfigError, match="holds bytes that are no UTF-8"):
        compose(RunConfig, "train", ["corpus.directory=a", "training.total_steps=1", override])


def test_bytes_of_the_shell_give_a_message_and_no_traceback() -> None:
    command = [sys.executable, "-m", "model", "generate", "checkpoint=here", b"prompt=caf\xe9"]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"1 problem in the configuration:\n  - prompt={REASON}\n"

"""One rule for the exit codes of all commands: 2 where the command, or what it names, must change; 1 where the work
fails all the same."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from conf import ConfigError
from conf.command_line import exit_code
from data_pipeline.__main__ import main as data_command
from data_pipeline.errors import BrokenOffError, CorpusError, DataError, MachineError, ReadingError
from launch.__main__ import _exit_code as launch_exit_code
from launch.__main__ import main as launch_command
from model.__main__ import main as model_command
from train.__main__ import main as train_command
from train.checkpoint import main as checkpoint_command
from train.evaluate.__main__ import main as evaluate_command
from train.report import main as report_command

Command = Callable[[list[str]], int]
RUN = ["name=x", "model=tiny_mlstm", "precision=fp32", "training.total_steps=1"]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (data_command, ["prepare", "data=text", "source=nowhere", "output=x"]),
        (data_command, ["prepare", "tokenizer=file", "tokenizer.path=nowhere", "output=x"]),
        (data_command, ["inspect", "nowhere"]),
        (data_command, ["verify", "nowhere"]),
        (data_command, ["merge", "nowhere", "nowhere", "--output", "x"]),
        (data_command, ["split", "nowhere", "--output", "x"]),
        (train_command, [*RUN, "corpus.directory=nowhere"]),
        (train_command, [*RUN, "corpus.directory=nowhere", "--plan"]),
        (train_command, [*RUN, "--config", "nowhere"]),
        (launch_command, ["local", *RUN, "corpus.directory=nowhere"]),
        (launch_command, ["submit", "--dry-run", *RUN, "corpus.directory=nowhere"]),
        (launch_command, ["submit", "--config", "nowhere", "name=x"]),
        (launch_command, ["status", "nowhere"]),
        (launch_command, ["logs", "nowhere"]),
        (launch_command, ["cancel", "nowhere"]),
        (launch_command, ["sweep", "collect", "nowhere", "--output", "x"]),
        (launch_command, ["sweep", "fit", "nowhere", "--output", "x"]),
        (launch_command, ["sweep", "predict", "nowhere", "--flops", "1e20"]),
        (evaluate_command, ["nowhere"]),
        (evaluate_command, ["nowhere@3"]),
        (evaluate_command, ["nowhere", "suite=length"]),
        (evaluate_command, ["nowhere", "suite=downstream"]),
        (evaluate_command, ["nowhere", "suite=task"]),
        (launch_command, ["reproduce", "nowhere"]),
        (checkpoint_command, ["list", "nowhere"]),
        (checkpoint_command, ["verify", "nowhere"]),
        (checkpoint_command, ["verify", "nowhere", "--all"]),
        (checkpoint_command, ["describe", "nowhere@3"]),
        (checkpoint_command, ["consolidate", "nowhere", "--output", "x"]),
        (checkpoint_command, ["fetch", "nowhere", "run", "--output", "x"]),
        (checkpoint_command, ["prune", "nowhere"]),
        (checkpoint_command, ["keep", "nowhere@3"]),
        (checkpoint_command, ["release", "nowhere"]),
        (report_command, ["nowhere"]),
        (report_command, ["nowhere", "nowhere too"]),
        (report_command, ["nowhere", "--output", "x.html"]),
        (model_command, ["describe", "nowhere/x"]),
        (model_command, ["describe", "nowhere@3"]),
        (model_command, ["generate", "checkpoint=nowhere"]),
        (model_command, ["generate", "checkpoint=nowhere@3"]),
        (model_command, ["serve", "checkpoint=nowhere"]),
        (model_command, ["serve", "checkpoint=nowhere@3"]),
        (model_command, ["export", "checkpoint=nowhere", "output=x"]),
        (model_command, ["import", "source=nowhere", "output=x"]),
        (model_command, ["average", "nowhere", "nowhere@3", "output=x"]),
    ],
)
def test_what_is_named_and_not_there_ends_every_command_with_2(
    command: Command,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(arguments) == 2
    printed = capsys.readouterr()
    assert "nowhere" in printed.err and "Traceback" not in printed.err
    assert not any(path.suffix != ".log" for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError(["seed: none"]), 2),
        (ValueError("no such model"), 2),
        (FileNotFoundError("no room"), 1),
        (KeyboardInterrupt(), 1),
    ],
)
def test_a_failure_of_the_machine_is_1_and_what_must_change_is_2(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    assert exit_code(fail, (OSError,), "interrupted", (ValueError, OSError)) == code
    assert (str(error) or "interrupted") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(CorpusError("damaged"), 2), (ReadingError("no answer"), 1), (BrokenOffError("no space"), 1)]
)
def test_data_that_must_change_are_2_and_a_machine_that_fails_is_1(error: DataError, code: int) -> None:
    def fail() -> int:
        raise error

    assert launch_exit_code(fail) == code
    assert exit_code(fail, (MachineError, OSError), "interrupted", (DataError,)) == code


@pytest.mark.parametrize("command", [data_command, launch_command, model_command, checkpoint_command])
def test_help_that_nobody_reads_ends_quietly(command: Callable[[Sequence[str]], int]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    # As a pipe of a shell is: nothing is written before the command ends.
    stream = io.TextIOWrapper(io.BufferedWriter(io.FileIO(writer, "w")), encoding="utf-8")
    with redirect_stdout(stream), pytest.raises(SystemExit) as ended:
        command(["--help"])
    assert ended.value.code == 0
    # What the interpreter does at its end.
    stream.close()

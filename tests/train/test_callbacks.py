"""The callbacks that write and show: metrics.jsonl, the progress bar, W&B.

`FakeTrainer` holds what they read of a trainer; the whole run with all of them is in test_resume.py.
"""

import io
import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch.multiprocessing as multiprocessing

from tests.train.wandb_files import records
from train.callbacks.metrics_file import MetricsFile, is_measurement, read_metrics
from train.callbacks.progress import Progress
from train.callbacks.wandb_logger import WandbLogger, panel_name
from train.config import LoggingConfig, RunConfig, WandbConfig
from train.decisions import Rollback
from train.evaluate import EvaluationResult


@dataclass
class FakeTrainer:
    run_directory: Path
    step: int = 0
    total_steps: int = 100
    is_main: bool = True
    config: RunConfig = field(default_factory=lambda: RunConfig(name="unit"))


def record(step: int, loss: float = 2.0) -> dict:
    return {
        "kind": "train",
        "step": step,
        "tokens": 256 * step,
        "loss": loss,
        "tokens_per_second": 12345.6,
        "step_seconds": 0.5,
        "mfu_6n": None,
    }


def log_steps(callback, trainer: FakeTrainer, steps: range, loss: float = 2.0) -> None:
    callback.on_run_start(trainer)
    for step in steps:
        trainer.step = step
        callback.on_metrics(trainer, record(step, loss))
        callback.on_step_end(trainer)


RESULT = {"validation": EvaluationResult(loss=1.5, perplexity=math.exp(1.5), tokens=1000)}


def test_metrics_are_read_back_as_written(tmp_path):
    trainer, callback = FakeTrainer(tmp_path), MetricsFile()
    log_steps(callback, trainer, range(1, 3))
    callback.on_statistics(trainer, {"blocks.00.output_rms": 0.5})
    callback.on_evaluation(trainer, RESULT)
    callback.on_run_end(trainer, "complete")
    lines = read_metrics(tmp_path)
    assert lines == [
        record(1),
        record(2),
        {"kind": "statistics", "step": 2, "values": {"blocks.00.output_rms": 0.5}},
        {"kind": "evaluation", "step": 2, "set": "validation", **vars(RESULT["validation"])},
    ]


def test_profiles_are_lists_and_what_is_not_finite_is_null(tmp_path):
    trainer, callback = FakeTrainer(tmp_path), MetricsFile()
    log_steps(callback, trainer, range(1, 2))
    callback.on_profiles(trainer, {"blocks.00.mixer.memory_tokens": [1 / 3, math.inf, math.nan]})
    line = {"kind": "profiles", "step": 1, "values": {"blocks.00.mixer.memory_tokens": [0.3333333, None, None]}}
    assert read_metrics(tmp_path) == [record(1), line]
    assert not is_measurement(line | {"values": {"x": [1.0, "2"]}}) and not is_measurement(line | {"values": [1.0]})


def test_each_line_is_on_disk_at_once(tmp_path):
    trainer, callback = FakeTrainer(tmp_path), MetricsFile()
    log_steps(callback, trainer, range(1, 2))
    assert read_metrics(tmp_path) == [record(1)]
    callback.on_run_end(trainer, "stopped")


def test_a_resumed_run_has_every_step_once_even_behind_a_torn_line(tmp_path):
    trainer = FakeTrainer(tmp_path)
    log_steps(MetricsFile(), trainer, range(1, 11), loss=2.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 11, "lo')
    resumed = MetricsFile()
    trainer.step = 6
    log_steps(resumed, trainer, range(7, 13), loss=3.0)
    resumed.on_run_end(trainer, "complete")
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["loss"] for line in lines] == [2.0] * 6 + [3.0] * 6


def test_a_run_that_goes_back_has_every_step_once(tmp_path):
    trainer, callback = FakeTrainer(tmp_path), MetricsFile()
    log_steps(callback, trainer, range(1, 9), loss=2.0)
    trainer.step = 5
    callback.on_rollback(trainer, Rollback(step=5, skip=1), left=9)
    for step in range(6, 11):
        trainer.step = step
        callback.on_metrics(trainer, record(step, 3.0))
    callback.on_run_end(trainer, "complete")
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        *((step, 2.0) for step in range(1, 6)),
        *((step, 3.0) for step in range(6, 11)),
    ]
    other = MetricsFile()
    other.on_rollback(FakeTrainer(tmp_path, is_main=False), Rollback(step=0, skip=0), left=9)
    assert len(read_metrics(tmp_path)) == 10


def test_losses_survive_the_file_bitwise(tmp_path):
    trainer, callback = FakeTrainer(tmp_path), MetricsFile()
    loss = 0.1 + 0.2
    log_steps(callback, trainer, range(1, 2), loss=loss)
    callback.on_run_end(trainer, "complete")
    assert read_metrics(tmp_path)[0]["loss"] == loss


def test_numbers_that_are_not_finite_become_null(tmp_path):
    trainer, callback = FakeTrainer(tmp_path), MetricsFile()
    log_steps(callback, trainer, range(1, 2), loss=math.nan)
    callback.on_statistics(trainer, {"logits.max": math.inf})
    callback.on_run_end(trainer, "complete")
    first, second = read_metrics(tmp_path)
    assert first["loss"] is None
    assert second["values"] == {"logits.max": None}
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_only_rank_0_writes(tmp_path):
    callback = MetricsFile()
    log_steps(callback, FakeTrainer(tmp_path, is_main=False), range(1, 3))
    assert list(tmp_path.iterdir()) == []


def test_reading_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="is .* the folder of a run that has started"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "header", "format_version": 99, "step": 0}) + "\n")
    with pytest.raises(
        ValueError, match="format_version 99; this version of xlstm-pretrain reads 1; a later version wrote it"
    ):
        read_metrics(tmp_path)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_step_loss_speed_and_time_left(tmp_path):
    terminal = Terminal()
    callback = Progress(stream=terminal)
    trainer = FakeTrainer(tmp_path, step=40)
    log_steps(callback, trainer, range(41, 51))
    callback.on_evaluation(trainer, RESULT)
    callback.on_run_end(trainer, "complete")
    shown = terminal.getvalue().split("\r")
    assert "step 40/100" in shown[1]
    assert "step 50/100" in shown[-1]
    assert "left, 12,346 tokens/s, loss 2.0000" in shown[-1]
    assert "held-out validation: loss 1.5000, perplexity 4.48 over 1,000 tokens" in terminal.getvalue()
    # What the bar showed stays above it.
    for step in range(41, 51):
        assert f"step {step}/100  loss 2.0000  12,346 tokens/s" in terminal.getvalue()


def test_the_bar_ends_with_its_terminal_and_lines_go_on(tmp_path):
    class Vanishing(Terminal):
        gone = False

        def isatty(self) -> bool:
            return not self.gone

    terminal, trainer = Vanishing(), FakeTrainer(tmp_path, step=40)
    callback = Progress(stream=terminal)
    log_steps(callback, trainer, range(41, 43))
    terminal.gone = True
    before = len(terminal.getvalue())
    trainer.step = 43
    callback.on_step_end(trainer)
    callback.on_metrics(trainer, record(43))
    callback.on_run_end(trainer, "complete")
    assert terminal.getvalue()[before:] == "step 43/100  loss 2.0000  12,346 tokens/s  28s left\n"


@pytest.mark.parametrize(
    "remaining, left", [(90, "45s"), (400, "3m 20s"), (15_000, "2h 05m"), (2_000_000, "11d 13h"), (0, "0s")]
)
def test_without_a_terminal_each_logged_step_is_one_plain_line(tmp_path, remaining, left):
    stream = io.StringIO()
    callback = Progress(stream=stream)
    log_steps(callback, FakeTrainer(tmp_path, total_steps=10 + remaining), range(10, 11))
    assert stream.getvalue() == f"step 10/{10 + remaining}  loss 2.0000  12,346 tokens/s  {left} left\n"


def test_a_rollback_is_shown_and_the_bar_goes_back(tmp_path):
    rollback = Rollback(step=20, skip=3)
    terminal, stream = Terminal(), io.StringIO()
    for where, shown_step in ((terminal, "step 22/100"), (stream, "step 22/100  loss")):
        callback, trainer = Progress(stream=where), FakeTrainer(tmp_path, step=40)
        log_steps(callback, trainer, range(41, 43))
        trainer.step = 20
        callback.on_rollback(trainer, rollback, left=43)
        assert "step 43/100  back to step 20, leaving out the samples of 3 steps" in where.getvalue()
        for step in (21, 22):
            trainer.step = step
            callback.on_metrics(trainer, record(step))
            callback.on_step_end(trainer)
        callback.on_run_end(trainer, "complete")
        assert shown_step in where.getvalue().splitlines()[-1].split("\r")[-1]


def test_other_ranks_show_nothing(tmp_path):
    stream = io.StringIO()
    callback = Progress(stream=stream)
    trainer = FakeTrainer(tmp_path, is_main=False)
    log_steps(callback, trainer, range(1, 3))
    callback.on_evaluation(trainer, RESULT)
    callback.on_run_end(trainer, "complete")
    assert stream.getvalue() == ""


def with_wandb(tmp_path: Path, mode: str) -> FakeTrainer:
    config = RunConfig(name="unit", logging=replace(LoggingConfig(), wandb=WandbConfig(mode=mode)))
    return FakeTrainer(tmp_path, config=config)


def _wandb_session(_: int, run_directory: Path, done: int, steps: range) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        os.environ.pop(name, None)
    trainer, callback = with_wandb(run_directory, "auto"), WandbLogger()
    trainer.step = done
    log_steps(callback, trainer, steps)
    callback.on_statistics(trainer, {"blocks.00.output_rms": 0.5})
    mixer = "blocks.00.mixer"
    profiles = {f"{mixer}.memory_tokens": [3.0, math.inf], f"{mixer}.fgate_histogram": [1 / 16] * 16}
    callback.on_profiles(trainer, profiles | {f"{mixer}.state_log_norm": [math.nan]})
    callback.on_evaluation(trainer, RESULT)
    callback.on_run_end(trainer, "stopped")


@pytest.mark.slow
def test_an_offline_wandb_run_keeps_its_id_and_row_numbers_over_a_resume(tmp_path):
    multiprocessing.spawn(_wandb_session, (tmp_path, 0, range(1, 4)))
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    multiprocessing.spawn(_wandb_session, (tmp_path, 2, range(3, 5)))
    assert (tmp_path / "wandb_id.txt").read_text().strip() == run_id
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {file.stem for file in files} == {f"run-{run_id}"}
    # The second session does not begin again at row 0.
    assert [_rows(file) for file in files] == [[1, 2, 3], [3, 4]]


def _wandb_session_with_a_rollback(_: int, run_directory: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        os.environ.pop(name, None)
    trainer, callback = with_wandb(run_directory, "auto"), WandbLogger()
    log_steps(callback, trainer, range(1, 5))
    saved = json.loads(json.dumps(callback.state_dict()))
    for _ in range(2):
        trainer.step = 2
        callback.load_state_dict(saved)
        callback.on_rollback(trainer, Rollback(step=2, skip=1), left=5)
        for step in (3, 4):
            trainer.step = step
            callback.on_metrics(trainer, record(step))
    (run_directory / "state.json").write_text(json.dumps(callback.state_dict()))
    callback.on_run_end(trainer, "stopped")


@pytest.mark.slow
def test_an_offline_wandb_run_loses_no_row_to_a_rollback(tmp_path):
    """W&B drops what names a row before its latest."""
    multiprocessing.spawn(_wandb_session_with_a_rollback, (tmp_path,))
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    # 4 steps; twice the rollback, in the row of the step that was given up, and 2 steps.
    assert _rows(file) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    again = WandbLogger()
    again.load_state_dict(json.loads((tmp_path / "state.json").read_text()))
    assert again.state_dict()["rows_ahead"] == 6


@pytest.mark.slow
def test_statistics_of_a_block_stand_in_one_section(tmp_path):
    multiprocessing.spawn(_wandb_session, (tmp_path, 0, range(1, 3)))
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    written = file.read_bytes()
    assert b"blocks.00/output_rms" in written and b"statistics/" not in written
    assert b"blocks.00/mixer.memory_tokens" in written and b"blocks.00/mixer.fgate_histogram" in written
    assert b'"histogram"' in written and b"state_log_norm" not in written
    assert panel_name("blocks.03.mixer.gradient_norm") == "blocks.03/mixer.gradient_norm"
    assert panel_name("logits.soft_cap_saturation") == "statistics/logits.soft_cap_saturation"
    # A run that began with other names keeps them.
    before, new = WandbLogger(), WandbLogger()
    before.load_state_dict({"id": "a", "rows_ahead": 0})
    new.load_state_dict({})
    assert (before.state_dict()["has_sections"], new.state_dict()["has_sections"]) == (False, True)


def _rows(file: Path) -> list[int]:
    """W&B's own row numbers in a .wandb file."""
    return [one.history.step.num for one in records(file) if one.WhichOneof("record_type") == "history"]


def test_the_wandb_id_comes_from_the_folder_then_the_checkpoint(tmp_path):
    callback = WandbLogger()
    callback.load_state_dict({"id": "from_checkpoint"})
    assert callback._find_id(tmp_path) == "from_checkpoint"
    (tmp_path / "wandb_id.txt").write_text("from_folder\n")
    assert callback._find_id(tmp_path) == "from_folder"


def test_disabled_wandb_writes_nothing(tmp_path):
    callback = WandbLogger()
    trainer = with_wandb(tmp_path, "disabled")
    log_steps(callback, trainer, range(1, 3))
    callback.on_run_end(trainer, "complete")
    assert list(tmp_path.iterdir()) == []

"""The report: drawn from a realistic run's metrics, from the least there can be, and refused with a reason."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.runs import PATIENCE, ROOT, environment
from train.report import Series, draw_report, main

HEADER = {"kind": "header", "format_version": 1, "step": 0}


def train_line(step: int, noise: float = 0.0) -> dict:
    return {
        "kind": "train",
        "step": step,
        "tokens": step * 8192,
        "loss": 3.1 + 5.2 * math.exp(-step / 60) + 0.08 * noise,
        "learning_rate": 3e-3 * min(1, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / 600)),
        "grad_norm": (0.4 + 3 * math.exp(-step / 40)) * math.exp(0.25 * noise),
        "tokens_per_second": 5200 + 150 * noise,
        "memory_gib": 1.4,
        "mfu_exact": None,
        "skipped_steps": 0,
    }


def statistics_line(step: int, blocks: int) -> dict:
    values = {}
    for block in range(blocks):
        name, grown = f"blocks.{block:02d}", step / 600
        values |= {
            f"{name}.mixer_norm.input_rms": 0.02 * (1 + block) * (1 + 20 * grown),
            f"{name}.mixer.gradient_norm": 0.2 / (1 + block) / (0.1 + grown),
            f"{name}.mixer.igate_preact_min": -9.0 - 2 * grown,
            f"{name}.mixer.igate_preact_max": -8.5 + (5 + block) * grown,
            f"{name}.mixer.igate_preact_mean": -8.7 + grown,
            f"{name}.mixer.fgate_preact_min": 3.0 - 4 * grown,
            f"{name}.mixer.fgate_preact_max": 5.7 + 2 * grown,
            f"{name}.mixer.fgate_preact_mean": 4.4,
            f"{name}.mixer.stabiliser_min": -9.0,
            f"{name}.mixer.stabiliser_max": -3 + 2 * grown,
            f"{name}.mixer.igate_soft_cap_saturation": 0.02 * grown * block,
            f"{name}.mixer.fgate_soft_cap_saturation": 0.0,
        }
        if block != 1:
            values[f"{name}.mixer.normaliser_floor_fraction"] = 0.98 - 0.1 * grown * block
    return {"kind": "statistics", "step": step, "values": values | {"logits.soft_cap_saturation": 0.001}}


def write_run(folder: Path, blocks: int = 6, steps: int = 600) -> Path:
    noise = np.random.default_rng(0).standard_normal(steps)
    lines = [HEADER]
    for step in range(2, steps + 1, 2):
        lines.append(train_line(step, noise[step - 1]))
        if step % 50 == 0 and blocks:
            lines.append(statistics_line(step, blocks))
        if step % 100 == 0:
            loss = train_line(step)["loss"] + 0.06
            lines.append({"kind": "evaluation", "step": step, "set": "validation", "loss": loss, "tokens": 65536})
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    baselines = {"unigram": {"loss": 6.02, "k": 1.0}, "bigram": {"loss": 4.31, "k": 0.01}}
    (folder / "baselines.json").write_text(json.dumps(baselines))
    return folder


def pixels(path: Path) -> np.ndarray:
    from matplotlib import image

    return image.imread(path)


def test_a_run_becomes_a_picture(tmp_path):
    path = draw_report(write_run(tmp_path / "demo"))
    assert path == tmp_path / "demo" / "report.png"
    picture = pixels(path)
    assert picture.shape[0] > 1200 and picture.shape[1] > 1400
    assert sorted(file.name for file in path.parent.iterdir()) == ["baselines.json", "metrics.jsonl", "report.png"]


def test_every_panel_changes_with_its_statistics(tmp_path):
    whole = pixels(draw_report(write_run(tmp_path / "a")))
    empty = write_run(tmp_path / "b")
    lines = [json.loads(line) for line in (empty / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "statistics":
            line["values"] = {"out_norm.input_rms": 1.0}
    (empty / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    without = pixels(draw_report(empty))
    assert whole.shape == without.shape
    assert not np.array_equal(whole[whole.shape[0] // 2 :], without[whole.shape[0] // 2 :])


def test_a_run_without_statistics_has_two_rows_less(tmp_path):
    with_statistics = pixels(draw_report(write_run(tmp_path / "a")))
    without = pixels(draw_report(write_run(tmp_path / "b", blocks=0)))
    assert without.shape[0] < 0.7 * with_statistics.shape[0]


def test_the_first_logged_step_is_enough_and_null_is_no_obstacle(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (HEADER, train_line(1))))
    assert draw_report(tmp_path).is_file()
    broken = train_line(2) | {"loss": None, "grad_norm": None}
    statistics = statistics_line(2, 2)
    statistics["values"]["blocks.00.mixer.gradient_norm"] = None
    lines = (HEADER, train_line(1), broken, statistics)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert draw_report(tmp_path).is_file()


def test_statistics_are_found_by_block_and_combined_over_blocks():
    lines = [statistics_line(step, 3) for step in (50, 100)]
    series = Series(lines)
    floors = series.by_block("mixer.normaliser_floor_fraction")
    assert sorted(floors) == [0, 2]
    assert floors[2].tolist() == [line["values"]["blocks.02.mixer.normaliser_floor_fraction"] for line in lines]
    highest = series.over_blocks("mixer.igate_preact_max", np.nanmax)
    assert highest.tolist() == [line["values"]["blocks.02.mixer.igate_preact_max"] for line in lines]
    assert series.over_blocks("mixer.absent", np.nanmax) is None


def test_the_command_line(tmp_path, capsys):
    assert main(["--help"]) == 0
    assert main([]) == 2
    assert main([str(tmp_path)]) == 1
    assert "no such file; is" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text(json.dumps(HEADER) + "\n")
    with pytest.raises(ValueError, match="has no logged step yet"):
        draw_report(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "train.report", str(write_run(tmp_path / "demo"))],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "demo" / "report.png")
    assert done.stderr == ""

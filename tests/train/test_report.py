"""The report: drawn from a realistic run's metrics, from the least there can be, and refused with a reason."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axis import Axis
from matplotlib.legend import Legend
from matplotlib.text import Text

from tests.runs import PATIENCE, ROOT, environment
from train.figure import Page, series_style
from train.report import draw_report, main
from train.report.comparison_picture import comparison_picture
from train.report.monitors import Series
from train.report.run_picture import report_page
from train.report.runs import read_runs

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
            f"{name}.mixer.never_forgets": 0.25 * grown,
            f"{name}.mixer.always_forgets": 0.5,
            f"{name}.mixer.igate_soft_cap_saturation": 0.02 * grown * block,
            f"{name}.mixer.fgate_soft_cap_saturation": 0.0,
        }
        if block != 1:
            values[f"{name}.mixer.normaliser_floor_fraction"] = 0.98 - 0.1 * grown * block
    return {"kind": "statistics", "step": step, "values": values | {"logits.soft_cap_saturation": 0.001}}


def profiles_line(step: int, blocks: int) -> dict:
    values = {}
    for block in range(blocks):
        name = f"blocks.{block:02d}.mixer"
        values |= {
            f"{name}.memory_tokens": [(1 + head) * (10 + step) * (1 + block) for head in range(4)],
            f"{name}.fgate_histogram": [1 / 16] * 16,
            f"{name}.igate_histogram": [0.0] * 8 + [1.0] + [0.0] * 7,
            f"{name}.state_log_norm": [-3.0 + position + block for position in range(8)] + [None],
        }
    return {"kind": "profiles", "step": step, "values": values}


def write_run(folder: Path, blocks: int = 6, steps: int = 600, sets: Sequence[str] = ("validation",)) -> Path:
    noise = np.random.default_rng(0).standard_normal(steps)
    lines = [HEADER]
    for step in range(2, steps + 1, 2):
        lines.append(train_line(step, noise[step - 1]))
        if step % 50 == 0 and blocks:
            lines += [statistics_line(step, blocks), profiles_line(step, blocks)]
        if step % 100 == 0:
            loss = train_line(step)["loss"] + 0.06
            lines += [{"kind": "evaluation", "step": step, "set": s, "loss": loss, "tokens": 65536} for s in sets]
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
    assert main([str(tmp_path)]) == 2
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


LONG = "a name of many words, as a folder of the web's second crawl may have it; part"


def boxes(page: Page) -> dict[str, object]:
    """Everything written in the picture but the numbers at axes, by what it says, in pixels."""
    page.figure.canvas.draw()
    ticks = {text for axis in page.figure.findobj(Axis) for text in axis.get_ticklabels(which="both")}
    ticks |= {axis.get_offset_text() for axis in page.figure.findobj(Axis)}
    texts = [text for text in page.figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return {f"{number} {text.get_text()}": text.get_window_extent() for number, text in enumerate(texts)
            if text not in ticks}  # fmt: skip


def check_layout(page: Page) -> None:
    """Nothing is cut at the edge, nothing lies on something else, and legends lie beside what they explain."""
    found = boxes(page)
    canvas = page.figure.bbox
    for text, box in found.items():
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= canvas.x1 + 1 and box.y1 <= canvas.y1 + 1, text
    names = list(found)
    for place, name in enumerate(names):
        over = [other for other in names[place + 1 :] if found[name].shrunk(0.98, 0.9).overlaps(found[other])]
        assert not over, f"{name} lies on {over}"
    panels = [axes for axes in page.figure.axes if axes.get_label() != "legend"]
    for legend in page.figure.findobj(Legend):
        box = legend.get_window_extent()
        assert canvas.x1 >= box.x1 and box.x0 >= 0 and box.y0 >= 0
        assert not [axes.get_title("left") for axes in panels if axes.bbox.overlaps(box)]
    heights = [axes.bbox.height for axes in panels if axes.get_label() != "<colorbar>"]
    assert min(heights) > 100, "a panel has no room"
    pyplot.close(page.figure)


@pytest.mark.parametrize(
    "count, name, blocks", [(1, "s", 0), (2, LONG, 6), (7, LONG, 0), (20, "W_$y$" * 40, 6)], ids=["1", "2", "7", "20"]
)
def test_a_report_of_any_number_of_sets_has_room_for_all_it_says(tmp_path, count, name, blocks):
    sets = ["validation", *(f"validation/{name}{number}" for number in range(count - 1))]
    page = report_page(write_run(tmp_path / name[:180], blocks, 600, sets))
    lines = [line for line in page.figure.axes[0].lines if line.get_label().startswith("held out")]
    assert len(lines) == count
    assert len({line.get_label() for line in lines}) == count
    assert len({(line.get_color(), str(line.get_linestyle()), line.get_marker()) for line in lines}) == count
    check_layout(page)


def test_no_two_of_forty_series_look_alike():
    assert len({json.dumps(series_style(index)) for index in range(40)}) == 40


@pytest.mark.parametrize("count", [2, 20])
def test_runs_are_compared_in_one_picture(tmp_path, count):
    folders = [write_run(tmp_path / str(n), blocks=0, steps=20 + 100 * (n == 0)) for n in range(count)]
    folders[1] = folders[1].rename(tmp_path / f"_{LONG[:70]}")
    page = comparison_picture(read_runs(folders))
    losses, held_out = page.figure.axes[0], next(a for a in page.figure.axes if a.get_title("left") == "Held-out loss")
    labels = [line.get_label() for line in losses.lines]
    assert len(labels) == len(set(labels)) == count
    assert labels[0] == f"0  {train_line(120)['loss'] + 0.08 * np.random.default_rng(0).standard_normal(120)[-1]:.3f}"
    assert len(held_out.lines) == 0, "the short runs have scored nothing"
    assert losses.lines[0].get_xdata().tolist() == [step * 8192 for step in range(2, 121, 2)]
    assert {text.get_text() for text in page.figure.findobj(Legend)[0].get_texts()} == set(labels)
    check_layout(page)


def test_runs_of_one_name_are_told_apart_and_share_a_held_out_set(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    folders = [
        write_run(tmp_path / "a" / "run", 0, 200, ["x", "both"]),
        write_run(tmp_path / "b" / "run", 0, 200, ["both"]),
    ]
    page = comparison_picture(read_runs(folders))
    held_out = next(axes for axes in page.figure.axes if axes.get_title("left") == "Held-out loss")
    assert [line.get_label().split()[0] for line in page.figure.axes[0].lines] == ["a/run", "b/run"]
    assert [line.get_xdata().tolist() for line in held_out.lines] == [[100 * 8192.0, 200 * 8192.0]] * 2
    pyplot.close(page.figure)


def test_the_command_compares_runs_and_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [str(write_run(tmp_path / name, blocks=0, steps=20)) for name in "ab"]
    assert main(runs) == 0
    assert capsys.readouterr().out == "comparison.html\ncomparison.png\n"
    assert pixels(tmp_path / "comparison.png").shape[1] > 1400
    assert main([runs[0], "--output", "one.png"]) == 0 and (tmp_path / "one.png").is_file()
    assert main([runs[0], "--output", "new/two.png"]) == 0 and (tmp_path / "new" / "two.png").is_file()
    capsys.readouterr()
    assert main([runs[0], "--output", "one.png/x.png"]) == 1
    assert "one.png/x.png cannot be written (" in capsys.readouterr().err
    assert main([*runs, "--dpi"]) == 2
    assert "no such option: --dpi" in capsys.readouterr().err
    assert main([runs[0], "--output"]) == 2
    assert main([runs[0], str(tmp_path / "nothing")]) == 2
    assert "nothing/metrics.jsonl: no such file" in capsys.readouterr().err
    assert main([*runs, f"{runs[0]}/"]) == 0, "one of two names is one curve"
    assert [
        line.get_label()[0] for line in comparison_picture(read_runs([*runs, f"{runs[0]}/"])).figure.axes[0].lines
    ] == ["a", "b"]
    pyplot.close()
    others = [str(tmp_path / str(number)) for number in range(20)]
    assert main([*runs, *others]) == 2
    assert "22 runs are more than one picture shows; name at most 20" in capsys.readouterr().err

"""report.png: a run at a glance, drawn from what metrics.jsonl and baselines.json hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from conf.problems import is_later_format, other_format
from train.callbacks.metrics_file import read_metrics
from train.figure import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    PURPLE,
    STYLE,
    Page,
    column,
    engineering,
    legend_names,
    logarithmic,
    name_axes,
    series_style,
    shorter,
    smooth,
)
from train.ngram_baselines import FORMAT_VERSION as BASELINES_FORMAT
from train.report.monitors import Panel, Series, depth_of, draw_depth, panels_of

FILE_NAME = "report.png"
# Losses of so many held-out sets stand in the title; all stand in the legend.
_TITLE_SETS = 3
_BASELINES = ("unigram", "bigram")
# In nats per token, of any baseline that is drawn.
_LARGEST_LOSS = 1e6


@dataclass(frozen=True)
class _Curve:
    steps: np.ndarray
    losses: np.ndarray
    style: dict[str, Any]

    @property
    def latest(self) -> str:
        finite = self.losses[np.isfinite(self.losses)]
        return f"{finite[-1]:.3f}" if len(finite) else "-"


def draw_report(run_directory: Path | str, output: Path | None = None) -> Path:
    """Draw <run_directory>/report.png, or `output`, and return its path. Raises as `report_page` does."""
    path = output or Path(run_directory) / FILE_NAME
    report_page(Path(run_directory)).save(path)
    return path


@matplotlib.rc_context(STYLE)
def report_page(run_directory: Path) -> Page:
    """The picture of one run.

    Raises FileNotFoundError when the folder has no metrics.jsonl, ValueError when no step is in it yet.
    """
    lines = read_metrics(run_directory)
    train = [line for line in lines if line["kind"] == "train"]
    if not train:
        raise ValueError(
            f"{run_directory}: metrics.jsonl has no logged step yet; let the run take logging.interval steps"
        )
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    statistics = Series(*([line for line in lines if line["kind"] == kind] for kind in ("statistics", "profiles")))
    monitors = panels_of(statistics)
    curves = _loss_curves(train, evaluations, _read_baselines(run_directory))

    page = Page(_title(run_directory, train, evaluations), list(curves), 2 + -(-len(monitors) // 3))
    losses = page.panel(0, 0, columns=2)
    _draw_loss(losses, train, curves)
    page.draw_legend(losses)
    _draw_gradient_norm(page.panel(0, 2), train)
    _draw_training([page.panel(1, place) for place in range(3)], train)
    if monitors:
        _draw_monitors(page, monitors, statistics)
    for axes in page.figure.axes:
        if axes.get_xlabel() == "step":
            axes.set_xlim(-0.03 * train[-1]["step"], 1.03 * train[-1]["step"])
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return page


def _title(run_directory: Path, train: list[dict], evaluations: list[dict]) -> str:
    last = train[-1]
    facts = [run_directory.resolve().name, f"{last['step']:,} steps", f"{engineering(last['tokens'])} tokens"]
    latest = {line["set"]: line["loss"] for line in evaluations}
    known = [f"{shorter(name)} loss {loss:.3f}" for name, loss in latest.items() if loss is not None]
    return "   ·   ".join(facts + known[:_TITLE_SETS] + ["..."] * (len(known) > _TITLE_SETS))


def _read_baselines(run_directory: Path) -> dict[str, float]:
    path = run_directory / "baselines.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it, or move it away") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read (it holds no JSON object); restore it, or move it away")
    if is_later_format(version := content.get("format_version"), BASELINES_FORMAT):
        raise ValueError(other_format(path, version, BASELINES_FORMAT))
    losses = {name: content[name].get("loss") for name in _BASELINES if isinstance(content.get(name), dict)}
    return {name: loss for name, loss in losses.items() if type(loss) in (int, float) and abs(loss) < _LARGEST_LOSS}


def _loss_curves(train: list[dict], evaluations: list[dict], baselines: dict[str, float]) -> dict[str, _Curve]:
    """Everything in the panel of losses by its label, which ends in the latest loss."""
    steps = column(train, "step")
    curves = {"training": _Curve(steps, smooth(column(train, "loss")), {"color": BLUE})}
    for index, name in enumerate(dict.fromkeys(line["set"] for line in evaluations)):
        of_set = [line for line in evaluations if line["set"] == name]
        style = series_style(index) | {"markersize": 5, "markeredgecolor": "white"}
        curves[f"held out: {name}"] = _Curve(column(of_set, "step"), column(of_set, "loss"), style)
    ends, lines = np.array([0.0, steps[-1]]), {"unigram": (0, (4, 3)), "bigram": (0, (1, 2))}
    for name, loss in baselines.items():
        text = {"unigram": "unigram", "bigram": "bigram, add-k"}[name]
        style = {"color": MUTED, "linestyle": lines[name], "linewidth": 1.1}
        curves[text] = _Curve(ends, np.full(2, loss), style)
    return {
        f"{name}  {curve.latest}": curve
        for name, curve in zip(legend_names(list(curves)), curves.values(), strict=True)
    }


def _draw_loss(axes: Axes, train: list[dict], curves: dict[str, _Curve]) -> None:
    axes.plot(column(train, "step"), column(train, "loss"), color=BLUE, alpha=0.3, linewidth=1)
    for label, curve in curves.items():
        axes.plot(curve.steps, curve.losses, label=label, **curve.style)
    name_axes(axes, "Loss", "nats per token")


def _draw_gradient_norm(axes: Axes, train: list[dict]) -> None:
    steps, norms = column(train, "step"), column(train, "grad_norm")
    axes.plot(steps, norms, color=PURPLE, alpha=0.3, linewidth=1)
    axes.plot(steps, smooth(norms), color=PURPLE)
    logarithmic(axes, norms)
    skipped = train[-1].get("skipped_steps") or 0
    name_axes(axes, "Gradient norm", f"global L2, before clipping{f'; {skipped} steps skipped' if skipped else ''}")


def _draw_training(panels: list[Axes], train: list[dict]) -> None:
    steps = column(train, "step")
    axes = panels[0]
    axes.plot(steps, column(train, "learning_rate"), color=GREEN)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    name_axes(axes, "Learning rate", "of the latest step")

    axes = panels[1]
    axes.plot(steps, column(train, "tokens_per_second"), color=BLUE)
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.set_ylim(bottom=0)
    utilisation = column(train, "mfu_exact")
    note = (
        f"; model FLOPs utilisation {100 * np.nanmedian(utilisation):.1f} %" if np.isfinite(utilisation).any() else ""
    )
    name_axes(axes, "Throughput", f"tokens per second, all processes{note}")

    axes = panels[2]
    axes.plot(steps, column(train, "memory_gib"), color=ORANGE)
    axes.set_ylim(bottom=0)
    name_axes(axes, "Memory", "GiB of one process")


def _draw_monitors(page: Page, monitors: Sequence[Panel], statistics: Series) -> None:
    depth = depth_of(statistics)
    places = [page.panel(2 + number // 3, number % 3) for number in range(len(monitors))]
    for axes, panel in zip(places, monitors, strict=True):
        panel.draw(axes, statistics, depth)
    draw_depth(page.figure, places, depth)

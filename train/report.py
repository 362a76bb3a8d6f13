"""report.png: a run at a glance, drawn from what metrics.jsonl and baselines.json hold."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from conf.problems import undecodable
from train.callbacks.metrics_file import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.cm import ScalarMappable  # noqa: E402
from matplotlib.colors import ListedColormap, Normalize  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator  # noqa: E402

FILE_NAME = "report.png"
HELP = """\
Draw a run's report:  python -m train.report RUN_DIRECTORY
Writes RUN_DIRECTORY/report.png: losses, learning rate, gradient norm, throughput and the stability of every layer.
"""
_INK, _MUTED, _GRID = "#22272e", "#6b7480", "#e6e9ee"
_BLUE, _ORANGE, _GREEN, _PURPLE = "#2f6fb0", "#d9662b", "#3a8f5c", "#7a5195"
# Without the palest end, which vanishes on white.
_DEPTH = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.88, 256)))
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
}


class Series:
    """The statistics lines of a run as arrays over steps."""

    def __init__(self, lines: Sequence[dict[str, Any]]):
        self.steps = np.array([line["step"] for line in lines], dtype=float)
        names = dict.fromkeys(name for line in lines for name in line["values"])
        self.values = {name: _numbers([line["values"].get(name) for line in lines]) for name in names}

    def by_block(self, suffix: str) -> dict[int, np.ndarray]:
        """Block number -> values over steps, of the statistics "blocks.NN.<suffix>"."""
        found = {}
        for name, values in self.values.items():
            parts = name.split(".", 2)
            if parts[0] == "blocks" and parts[2] == suffix:
                found[int(parts[1])] = values
        return found

    def over_blocks(self, suffix: str, combine: Callable[..., np.ndarray]) -> np.ndarray | None:
        """`combine` (such as np.nanmin) of the statistic over all blocks that have it; None when no block has."""
        found = self.by_block(suffix)
        return combine(np.stack(list(found.values())), axis=0) if found else None


def draw_report(run_directory: Path | str) -> Path:
    """Draw <run_directory>/report.png and return its path.

    Raises FileNotFoundError when the folder has no metrics.jsonl, ValueError when no step is in it yet.
    """
    run_directory = Path(run_directory)
    lines = read_metrics(run_directory)
    train = [line for line in lines if line["kind"] == "train"]
    if not train:
        raise ValueError(
            f"{run_directory}: metrics.jsonl has no logged step yet; let the run take logging.interval steps"
        )
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    statistics = Series([line for line in lines if line["kind"] == "statistics"])
    has_statistics = len(statistics.steps) > 0

    with matplotlib.rc_context(_STYLE):
        rows = 4 if has_statistics else 2
        figure = pyplot.figure(figsize=(14, 2.9 * rows + 1.2), layout="constrained")
        grid = figure.add_gridspec(rows, 3, height_ratios=[1.45, *[1] * (rows - 1)])
        _draw_loss(figure.add_subplot(grid[0, :2]), train, evaluations, _read_baselines(run_directory))
        _draw_gradient_norm(figure.add_subplot(grid[0, 2]), train)
        _draw_training(figure, [grid[1, column] for column in range(3)], train)
        if has_statistics:
            cells = [grid[row, column] for row in (2, 3) for column in range(3)]
            _draw_stability(figure, [figure.add_subplot(cell) for cell in cells], statistics)
        for axes in figure.axes:
            if axes.get_label() != "<colorbar>":
                axes.set_xlim(-0.03 * train[-1]["step"], 1.03 * train[-1]["step"])
                axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        title = _title(run_directory, train, evaluations)
        figure.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=13, fontweight="bold")
        path = run_directory / FILE_NAME
        temporary = path.with_suffix(".tmp")
        figure.savefig(temporary, dpi=110, format="png")
        pyplot.close(figure)
    temporary.replace(path)
    return path


def _title(run_directory: Path, train: list[dict], evaluations: list[dict]) -> str:
    last = train[-1]
    facts = [run_directory.resolve().name, f"{last['step']:,} steps", f"{_engineering(last['tokens'])} tokens"]
    latest = {line["set"]: line["loss"] for line in evaluations}
    facts += [f"{name} loss {loss:.3f}" for name, loss in latest.items() if loss is not None]
    return "   ·   ".join(facts)


def _read_baselines(run_directory: Path) -> dict[str, float]:
    path = run_directory / "baselines.json"
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {name: content[name]["loss"] for name in ("unigram", "bigram") if name in content}


def _draw_loss(axes: Axes, train: list[dict], evaluations: list[dict], baselines: dict[str, float]) -> None:
    steps, losses = _column(train, "step"), _column(train, "loss")
    axes.plot(steps, losses, color=_BLUE, alpha=0.3, linewidth=1)
    axes.plot(steps, _smooth(losses), color=_BLUE, label="training")
    colors = (_ORANGE, _GREEN, _PURPLE, _INK)
    for index, name in enumerate(dict.fromkeys(line["set"] for line in evaluations)):
        color = colors[index % len(colors)]
        of_set = [line for line in evaluations if line["set"] == name]
        x, y = _column(of_set, "step"), _column(of_set, "loss")
        axes.plot(x, y, color=color, marker="o", markersize=5, markeredgecolor="white", label=f"held out: {name}")
        _label_end(axes, x[-1], y[-1], f"{y[-1]:.3f}", color)
    for name, loss in baselines.items():
        axes.axhline(loss, color=_MUTED, linestyle=(0, (4, 3)), linewidth=1.1)
        text = {"unigram": "unigram", "bigram": "bigram, add-k"}[name]
        axes.annotate(
            f"{text}  {loss:.3f}",
            (1, loss),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            color=_MUTED,
            fontsize=8.5,
        )
    _name(axes, "Loss", "nats per token")
    axes.legend(loc="upper center", ncols=4)


def _draw_gradient_norm(axes: Axes, train: list[dict]) -> None:
    steps, norms = _column(train, "step"), _column(train, "grad_norm")
    axes.plot(steps, norms, color=_PURPLE, alpha=0.3, linewidth=1)
    axes.plot(steps, _smooth(norms), color=_PURPLE)
    _logarithmic(axes, norms)
    skipped = train[-1].get("skipped_steps") or 0
    _name(axes, "Gradient norm", f"global L2, before clipping{f'; {skipped} steps skipped' if skipped else ''}")


def _draw_training(figure: Figure, cells: list[Any], train: list[dict]) -> None:
    steps = _column(train, "step")
    axes = figure.add_subplot(cells[0])
    axes.plot(steps, _column(train, "learning_rate"), color=_GREEN)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    _name(axes, "Learning rate", "of the latest step")

    axes = figure.add_subplot(cells[1])
    axes.plot(steps, _column(train, "tokens_per_second"), color=_BLUE)
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.set_ylim(bottom=0)
    utilisation = _column(train, "mfu_exact")
    note = (
        f"; model FLOPs utilisation {100 * np.nanmedian(utilisation):.1f} %" if np.isfinite(utilisation).any() else ""
    )
    _name(axes, "Throughput", f"tokens per second, all processes{note}")

    axes = figure.add_subplot(cells[2])
    axes.plot(steps, _column(train, "memory_gib"), color=_ORANGE)
    axes.set_ylim(bottom=0)
    _name(axes, "Memory", "GiB of one process")


def _draw_stability(figure: Figure, axes: list[Axes], statistics: Series) -> None:
    residual, gradient, gates, stabiliser, floor, saturation = axes
    blocks = [int(name.split(".")[1]) for name in statistics.values if name.startswith("blocks.")]
    depth = ScalarMappable(Normalize(0, max(max(blocks, default=0), 1)), _DEPTH)

    _draw_blocks(residual, statistics, "mixer_norm.input_rms", depth)
    _logarithmic(residual, residual)
    _name(residual, "Residual stream", "RMS at each block's first norm")

    _draw_blocks(gradient, statistics, "mixer.gradient_norm", depth)
    _logarithmic(gradient, gradient)
    _name(gradient, "Gradient norm by block", "L2, mixer parameters")

    for gate, color, name in (("igate", _ORANGE, "input gate"), ("fgate", _BLUE, "forget gate")):
        _draw_band(gates, statistics, f"mixer.{gate}_preact", color, name)
    _finish(gates, "Gate pre-activations", "least to greatest, and mean, over all blocks")

    _draw_band(stabiliser, statistics, "mixer.stabiliser", _PURPLE, "stabiliser m")
    _name(stabiliser, "Stabiliser", "least to greatest m over all blocks")

    _draw_blocks(floor, statistics, "mixer.normaliser_floor_fraction", depth)
    floor.set_ylim(-0.03, 1.03)
    _name(floor, "Normaliser floor", "share of tokens with |n·q| ≤ exp(−m)")

    for gate, color, name in (("igate", _ORANGE, "input gate"), ("fgate", _BLUE, "forget gate")):
        worst = statistics.over_blocks(f"mixer.{gate}_soft_cap_saturation", np.nanmax)
        if worst is not None:
            saturation.plot(statistics.steps, worst, color=color, marker=".", label=f"{name}, worst block")
    if "logits.soft_cap_saturation" in statistics.values:
        values = statistics.values["logits.soft_cap_saturation"]
        saturation.plot(statistics.steps, values, color=_GREEN, marker=".", label="logits")
    saturation.set_ylim(-0.03, 1.03)
    _finish(saturation, "Soft-cap saturation", "share beyond 0.8 of the cap")

    bar = figure.colorbar(depth, ax=axes, location="right", shrink=0.6, pad=0.01, aspect=40)
    bar.set_label("block (first to last)")
    bar.ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    bar.outline.set_visible(False)


def _draw_blocks(axes: Axes, statistics: Series, suffix: str, depth: ScalarMappable) -> None:
    """One line for each block, coloured by depth."""
    for block, values in statistics.by_block(suffix).items():
        color = depth.to_rgba(np.asarray(block))
        axes.plot(statistics.steps, values, color=color, marker=".", markersize=4, linewidth=1.2)


def _draw_band(axes: Axes, statistics: Series, prefix: str, color: str, name: str) -> None:
    lowest = statistics.over_blocks(f"{prefix}_min", np.nanmin)
    highest = statistics.over_blocks(f"{prefix}_max", np.nanmax)
    if lowest is None or highest is None:
        return
    axes.fill_between(statistics.steps, lowest, highest, color=color, alpha=0.22, linewidth=0, label=name)
    for edge in (lowest, highest):
        axes.plot(statistics.steps, edge, color=color, linewidth=1, marker=".", markersize=4)
    mean = statistics.over_blocks(f"{prefix}_mean", np.nanmean)
    if mean is not None:
        axes.plot(statistics.steps, mean, color=color, linewidth=2)


def _finish(axes: Axes, title: str, unit: str) -> None:
    _name(axes, title, unit)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")


def _name(axes: Axes, title: str, unit: str) -> None:
    """Title, the quantity's unit beneath it in small print, and the common x axis."""
    axes.set_title(title, pad=18)
    axes.annotate(
        unit, (0, 1), xycoords="axes fraction", xytext=(0, 5), textcoords="offset points", color=_MUTED, fontsize=8.5
    )
    axes.set_xlabel("step")
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured in this run", transform=axes.transAxes, ha="center", color=_MUTED)


def _label_end(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    if math.isfinite(y):
        axes.annotate(text, (x, y), xytext=(0, 8), textcoords="offset points", ha="center", color=color, weight="bold")


def _logarithmic(axes: Axes, values: np.ndarray | Axes) -> None:
    """A logarithmic y axis, where there is a positive value to show."""
    if isinstance(values, Axes):
        values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in values.lines] or [np.empty(0)])
    if (values[np.isfinite(values)] > 0).any():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def _column(lines: list[dict], key: str) -> np.ndarray:
    return _numbers([line.get(key) for line in lines])


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a fortieth of the run, without the values that are not finite."""
    half = max(1, len(values) // 80)
    finite = np.isfinite(values)
    kernel = np.ones(2 * half + 1)
    sums = np.convolve(np.where(finite, values, 0), kernel, "same")
    counts = np.convolve(finite.astype(float), kernel, "same")
    return (
        np.divide(sums, counts, out=np.full(len(values), math.nan), where=counts > 0)
        if len(values) > 2 * half
        else values
    )


def _engineering(number: float) -> str:
    return EngFormatter(places=1, sep="")(number)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(HELP, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    if problems := undecodable(arguments):
        print(f"train.report: {problems[0]}", file=sys.stderr)
        return 2
    try:
        print(draw_report(arguments[0]))
    except (OSError, ValueError) as error:
        print(f"train.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""report.png: a run at a glance, drawn from what metrics.jsonl and baselines.json hold; several runs: their curves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.ticker import EngFormatter, MaxNLocator

from conf.command_line import exit_code
from conf.passwords import without_passwords
from conf.problems import is_later_format, other_format, undecodable
from train.callbacks.metrics_file import read_metrics
from train.comparison import draw_comparison
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
    legend_below,
    legend_names,
    logarithmic,
    name_axes,
    numbers,
    series_style,
    shorter,
    smooth,
)
from train.ngram_baselines import FORMAT_VERSION as BASELINES_FORMAT

FILE_NAME = "report.png"
HELP = """\
Draw a run's report:  python -m train.report RUN_DIRECTORY
Writes RUN_DIRECTORY/report.png: losses, learning rate, gradient norm, throughput and the stability of every layer.

Compare runs:  python -m train.report RUN_DIRECTORY RUN_DIRECTORY ...
Writes comparison.png in the current folder: the curves of up to 20 runs in one picture, over the tokens they have read.

  --output FILE    write the picture there instead
"""
# Losses of so many held-out sets stand in the title; all stand in the legend.
_TITLE_SETS = 3
_BASELINES = ("unigram", "bigram")
# In nats per token, of any baseline that is drawn.
_LARGEST_LOSS = 1e6
# Without the palest end, which vanishes on white.
_DEPTH = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.88, 256)))


@dataclass(frozen=True)
class _Curve:
    steps: np.ndarray
    losses: np.ndarray
    style: dict[str, Any]

    @property
    def latest(self) -> str:
        finite = self.losses[np.isfinite(self.losses)]
        return f"{finite[-1]:.3f}" if len(finite) else "-"


class Series:
    """The statistics lines of a run as arrays over steps."""

    def __init__(self, lines: Sequence[dict[str, Any]]):
        self.steps = np.array([line["step"] for line in lines], dtype=float)
        names = dict.fromkeys(name for line in lines for name in line["values"])
        self.values = {name: numbers([line["values"].get(name) for line in lines]) for name in names}

    def by_block(self, suffix: str) -> dict[int, np.ndarray]:
        """Block number -> values over steps, of the statistics "blocks.NN.<suffix>"."""
        found = {}
        for name, values in self.values.items():
            parts = name.split(".", 2)
            if len(parts) == 3 and _is_of_block(name) and parts[2] == suffix:
                found[int(parts[1])] = values
        return found

    def over_blocks(self, suffix: str, combine: Callable[..., np.ndarray]) -> np.ndarray | None:
        """`combine` (such as np.nanmin) of the statistic over all blocks that have it; None when no block has."""
        found = self.by_block(suffix)
        return combine(np.stack(list(found.values())), axis=0) if found else None


def _is_of_block(statistic: str) -> bool:
    kind, _, rest = statistic.partition(".")
    return kind == "blocks" and rest.partition(".")[0].isdecimal()


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
    statistics = Series([line for line in lines if line["kind"] == "statistics"])
    has_statistics = len(statistics.steps) > 0
    curves = _loss_curves(train, evaluations, _read_baselines(run_directory))

    page = Page(_title(run_directory, train, evaluations), list(curves), 4 if has_statistics else 2)
    losses = page.panel(0, 0, columns=2)
    _draw_loss(losses, train, curves)
    page.draw_legend(losses)
    _draw_gradient_norm(page.panel(0, 2), train)
    _draw_training([page.panel(1, place) for place in range(3)], train)
    if has_statistics:
        _draw_stability(page, [page.panel(row, place) for row in (2, 3) for place in range(3)], statistics)
    for axes in page.figure.axes:
        if axes.get_label() not in ("<colorbar>", "legend"):
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


def _draw_stability(page: Page, axes: list[Axes], statistics: Series) -> None:
    residual, gradient, gates, stabiliser, floor, saturation = axes
    blocks = [int(name.split(".")[1]) for name in statistics.values if _is_of_block(name)]
    depth = ScalarMappable(Normalize(0, max(max(blocks, default=0), 1)), _DEPTH)

    _draw_blocks(residual, statistics, "mixer_norm.input_rms", depth)
    logarithmic(residual, residual)
    name_axes(residual, "Residual stream", "RMS at each block's first norm")

    _draw_blocks(gradient, statistics, "mixer.gradient_norm", depth)
    logarithmic(gradient, gradient)
    name_axes(gradient, "Gradient norm by block", "L2, mixer parameters")

    for gate, color, name in (("igate", ORANGE, "input gate"), ("fgate", BLUE, "forget gate")):
        _draw_band(gates, statistics, f"mixer.{gate}_preact", color, name)
    name_axes(gates, "Gate pre-activations", "least to greatest, and mean, over all blocks")
    legend_below(gates)

    _draw_band(stabiliser, statistics, "mixer.stabiliser", PURPLE, "stabiliser m")
    name_axes(stabiliser, "Stabiliser", "least to greatest m over all blocks")

    _draw_blocks(floor, statistics, "mixer.normaliser_floor_fraction", depth)
    floor.set_ylim(-0.03, 1.03)
    name_axes(floor, "Normaliser floor", "share of tokens with |n·q| ≤ exp(−m)")

    for gate, color, name in (("igate", ORANGE, "input gate"), ("fgate", BLUE, "forget gate")):
        worst = statistics.over_blocks(f"mixer.{gate}_soft_cap_saturation", np.nanmax)
        if worst is not None:
            saturation.plot(statistics.steps, worst, color=color, marker=".", label=name)
    if "logits.soft_cap_saturation" in statistics.values:
        values = statistics.values["logits.soft_cap_saturation"]
        saturation.plot(statistics.steps, values, color=GREEN, marker=".", label="logits")
    saturation.set_ylim(-0.03, 1.03)
    name_axes(saturation, "Soft-cap saturation", "share beyond 0.8 of the cap, in the worst block")
    legend_below(saturation)

    bar = page.figure.colorbar(depth, ax=axes, location="right", shrink=0.6, pad=0.01, aspect=40)
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


def main(arguments: Sequence[str]) -> int:
    """Draw; returns the exit code (docs/configuration.md): 2 also where a run has nothing to draw."""
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(HELP, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if problems := undecodable(arguments):
        print(f"train.report: {problems[0]}", file=sys.stderr)
        return 2
    runs, output, problem = _parsed(list(arguments))
    if problem:
        print(f"train.report: {problem}\n\n{HELP}", file=sys.stderr)
        return 2
    try:
        print(draw_report(runs[0], output) if len(runs) == 1 else draw_comparison(runs, output))
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        print(without_passwords(f"train.report: {error}"), file=sys.stderr)
        return 1 if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) else 2
    return 0


def _parsed(arguments: list[str]) -> tuple[list[str], Path | None, str]:
    """(runs, where to write, what is wrong or "")."""
    output = None
    if "--output" in arguments:
        place = arguments.index("--output")
        if len(arguments) == place + 1:
            return [], None, "--output: name the file to write"
        output = Path(arguments.pop(place + 1))
        del arguments[place]
    if unknown := [argument for argument in arguments if argument.startswith("-")]:
        return [], None, f"no such option: {' '.join(unknown)}"
    return arguments, output, "" if arguments else "name a run's directory"


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:]), (), "train.report: interrupted"))

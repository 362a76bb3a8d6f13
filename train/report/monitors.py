"""What the layers of a run report of themselves, a panel for each kind of statistic (meaning: model/statistics.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.figure import BLUE, GREEN, ORANGE, PURPLE, legend_below, logarithmic, name_axes, numbers

# Without the palest end, which vanishes on white.
_DEPTH = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.88, 256)))
_GATES = (("igate", ORANGE, "input gate"), ("fgate", BLUE, "forget gate"))


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


class Panel(Protocol):
    """Draws and names one panel; `depth` colours the blocks."""

    def __call__(self, axes: Axes, statistics: Series, depth: ScalarMappable) -> None: ...


def depth_of(statistics: Series) -> ScalarMappable:
    """Colours of the blocks, first to last."""
    blocks = [int(name.split(".")[1]) for name in statistics.values if _is_of_block(name)]
    return ScalarMappable(Normalize(0, max(max(blocks, default=0), 1)), _DEPTH)


def draw_depth(figure: Figure, axes: Sequence[Axes], depth: ScalarMappable) -> None:
    """What the colours say, beside `axes`."""
    bar = figure.colorbar(depth, ax=axes, location="right", shrink=0.6, pad=0.01, aspect=40)
    bar.set_label("block (first to last)")
    bar.ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    bar.outline.set_visible(False)


def _residual_stream(axes: Axes, statistics: Series, depth: ScalarMappable) -> None:
    _draw_blocks(axes, statistics, "mixer_norm.input_rms", depth)
    logarithmic(axes, axes)
    name_axes(axes, "Residual stream", "RMS at each block's first norm")


def _gradient_norm(axes: Axes, statistics: Series, depth: ScalarMappable) -> None:
    _draw_blocks(axes, statistics, "mixer.gradient_norm", depth)
    logarithmic(axes, axes)
    name_axes(axes, "Gradient norm by block", "L2, mixer parameters")


def _gates(axes: Axes, statistics: Series, depth: ScalarMappable) -> None:
    for gate, color, name in _GATES:
        _draw_band(axes, statistics, f"mixer.{gate}_preact", color, name)
    name_axes(axes, "Gate pre-activations", "least to greatest, and mean, over all blocks")
    legend_below(axes)


def _stabiliser(axes: Axes, statistics: Series, depth: ScalarMappable) -> None:
    _draw_band(axes, statistics, "mixer.stabiliser", PURPLE, "stabiliser m")
    name_axes(axes, "Stabiliser", "least to greatest m over all blocks")


def _normaliser_floor(axes: Axes, statistics: Series, depth: ScalarMappable) -> None:
    _draw_blocks(axes, statistics, "mixer.normaliser_floor_fraction", depth)
    axes.set_ylim(-0.03, 1.03)
    name_axes(axes, "Normaliser floor", "share of tokens with |n·q| ≤ exp(−m)")


def _saturation(axes: Axes, statistics: Series, depth: ScalarMappable) -> None:
    for gate, color, name in _GATES:
        worst = statistics.over_blocks(f"mixer.{gate}_soft_cap_saturation", np.nanmax)
        if worst is not None:
            axes.plot(statistics.steps, worst, color=color, marker=".", label=name)
    if "logits.soft_cap_saturation" in statistics.values:
        values = statistics.values["logits.soft_cap_saturation"]
        axes.plot(statistics.steps, values, color=GREEN, marker=".", label="logits")
    axes.set_ylim(-0.03, 1.03)
    name_axes(axes, "Soft-cap saturation", "share beyond 0.8 of the cap, in the worst block")
    legend_below(axes)


PANELS: tuple[Panel, ...] = (_residual_stream, _gradient_norm, _gates, _stabiliser, _normaliser_floor, _saturation)


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

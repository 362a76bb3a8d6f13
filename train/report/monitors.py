"""What the layers of a run report of themselves, a panel for each kind of statistic (meaning: model/statistics.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from model.statistics import HISTOGRAM_EDGES, STATE_POSITIONS
from train.figure import BLUE, GREEN, ORANGE, PURPLE, legend_below, logarithmic, name_axes, numbers

# Without the palest end, which vanishes on white.
_DEPTH = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.88, 256)))
_GATES = (("igate", ORANGE, "input gate"), ("fgate", BLUE, "forget gate"))


class Series:
    """The statistics of a run as arrays over steps, and its profiles (a number for each head, bin or position)."""

    def __init__(self, lines: Sequence[dict[str, Any]], profiles: Sequence[dict[str, Any]] = ()):
        """`lines` and `profiles`: of metrics.jsonl, those of these two kinds."""
        self.profile_steps = np.array([line["step"] for line in profiles], dtype=float)
        self._profiles = [line["values"] for line in profiles]
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

    def profiles_by_block(self, suffix: str) -> dict[int, np.ndarray]:
        """Block number -> [steps, elements], of the profiles "blocks.NN.<suffix>"."""
        names = dict.fromkeys(name for values in self._profiles for name in values)
        found = {}
        for name in names:
            _, _, rest = name.partition(".")
            block, _, last = rest.partition(".")
            if _is_of_block(name) and last == suffix:
                of_steps = [values.get(name, []) for values in self._profiles]
                width = max(map(len, of_steps))
                found[int(block)] = np.stack([numbers([*one, *[None] * (width - len(one))]) for one in of_steps])
        return found


def _is_of_block(statistic: str) -> bool:
    kind, _, rest = statistic.partition(".")
    return kind == "blocks" and rest.partition(".")[0].isdecimal()


class Draw(Protocol):
    """Draws and names one panel; `depth` colours the blocks."""

    def __call__(self, axes: Axes, statistics: Series, depth: ScalarMappable) -> None: ...


@dataclass(frozen=True)
class Panel:
    """One panel, and whether the colours in it are those of blocks."""

    draw: Draw
    is_by_block: bool = True


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


def _memory_over_time(axes: Axes, statistics: Series, depth: ScalarMappable) -> None:
    for block, values in statistics.profiles_by_block("mixer.memory_tokens").items():
        color = depth.to_rgba(np.asarray(block))
        axes.plot(statistics.profile_steps, values, color=color, linewidth=0.9)
    logarithmic(axes, axes)
    name_axes(axes, "Memory length of each head", "tokens until 1/e is left, at the mean forget gate")


def _memory_by_block(axes: Axes, statistics: Series, depth: ScalarMappable) -> None:
    for block, values in statistics.profiles_by_block("mixer.memory_tokens").items():
        color = depth.to_rgba(np.asarray(block))
        axes.plot(np.full(values.shape[1], block), values[-1], ".", color=color, markersize=6, alpha=0.8)
    logarithmic(axes, axes)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    name_axes(axes, "Memory length by layer", "tokens; a dot for each head, latest step", "block")


def _forgetting(axes: Axes, statistics: Series, depth: ScalarMappable) -> None:
    for key, color, name in (("never", BLUE, "never forget"), ("always", ORANGE, "always forget")):
        shares = statistics.over_blocks(f"mixer.{key}_forgets", np.nanmean)
        if shares is not None:
            axes.plot(statistics.steps, shares, color=color, marker=".", label=name)
    axes.set_ylim(-0.03, 1.03)
    name_axes(axes, "Heads that only keep or only forget", "share of the heads of all blocks")
    legend_below(axes)


def _histogram(gate: str, name: str) -> Draw:
    def draw(axes: Axes, statistics: Series, depth: ScalarMappable) -> None:
        found = list(statistics.profiles_by_block(f"mixer.{gate}_histogram").values())
        if found and found[0].shape[1] == len(HISTOGRAM_EDGES) + 1:
            shares = _mean_over_blocks(found)
            borders = [2 * HISTOGRAM_EDGES[0] - HISTOGRAM_EDGES[1], *HISTOGRAM_EDGES]
            borders.append(2 * HISTOGRAM_EDGES[-1] - HISTOGRAM_EDGES[-2])
            steps = _borders(statistics.profile_steps)
            axes.pcolormesh(steps, borders, np.sqrt(shares.T), cmap="Blues", vmin=0, vmax=1, rasterized=True)
        name_axes(axes, f"{name} over time", "pre-activations of all blocks; the darker, the more")

    return draw


def _mean_over_blocks(profiles: list[np.ndarray]) -> np.ndarray:
    """[steps, elements]; not a number where no block has one."""
    stacked = np.stack(profiles)
    measured = np.isfinite(stacked).sum(0)
    return np.divide(np.nansum(stacked, axis=0), measured, out=np.full(stacked.shape[1:], np.nan), where=measured > 0)


def _borders(steps: np.ndarray) -> np.ndarray:
    """Where the columns of these steps begin and end."""
    middles = (steps[1:] + steps[:-1]) / 2
    first = middles[0] - steps[0] if len(middles) else 0.5
    last = steps[-1] - middles[-1] if len(middles) else 0.5
    return np.concatenate([[steps[0] - first], middles, [steps[-1] + last]])


def _state_norm(axes: Axes, statistics: Series, depth: ScalarMappable) -> None:
    for block, values in statistics.profiles_by_block("mixer.state_log_norm").items():
        positions = STATE_POSITIONS[: values.shape[1]]
        norms = np.exp(np.clip(values[-1][: len(positions)], -300, 300))
        axes.plot(positions, norms, color=depth.to_rgba(np.asarray(block)), marker=".", markersize=4, linewidth=1.2)
    logarithmic(axes, axes)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    name_axes(axes, "Size of the memory by position", "norm of C, latest step", "tokens of the document so far")


_STATISTICS = (
    Panel(_residual_stream),
    Panel(_gradient_norm),
    Panel(_gates, is_by_block=False),
    Panel(_stabiliser, is_by_block=False),
    Panel(_normaliser_floor),
    Panel(_saturation, is_by_block=False),
)
_PROFILES = (
    Panel(_memory_over_time),
    Panel(_memory_by_block),
    Panel(_forgetting, is_by_block=False),
    Panel(_histogram("fgate", "Forget gate"), is_by_block=False),
    Panel(_histogram("igate", "Input gate"), is_by_block=False),
    Panel(_state_norm),
)


def panels_of(statistics: Series) -> tuple[Panel, ...]:
    """Those of the statistics, and those of profiles where the run has some: runs of versions before have none."""
    if not len(statistics.steps):
        return ()
    return _STATISTICS + (_PROFILES if len(statistics.profile_steps) else ())


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

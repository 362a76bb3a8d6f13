"""What all pictures of runs have in common: style, colours that do not repeat, legends and titles that have room."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.gridspec import GridSpec  # noqa: E402
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator  # noqa: E402
from matplotlib.transforms import offset_copy  # noqa: E402

INK, MUTED, GRID = "#22272e", "#6b7480", "#e6e9ee"
BLUE, ORANGE, GREEN, PURPLE = "#2f6fb0", "#d9662b", "#3a8f5c", "#7a5195"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
}
WIDTH = 14.0
# Inches of a row of a legend, and of what stands beside the text of an entry.
_LEGEND_ROW, _LEGEND_HANDLE = 0.21, 0.65
_LONGEST_NAME = 60
# Characters of the title that fit into one line of it.
_TITLE_CHARACTERS = 118
_SERIES_COLORS = (
    *(ORANGE, GREEN, PURPLE, "#c2a11c", "#17a2b8", "#c0397b", "#8a5a33", "#7f9c1f", "#1d3b6f", "#e08fa8"),
)
_SERIES_LINES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1, 1.5)))
_SERIES_MARKERS = ("o", "s", "^", "D")


def series_style(index: int) -> dict[str, Any]:
    """Colour, line and marker of the series number `index`: no two of the first 40 are alike, none is BLUE."""
    turn = index // len(_SERIES_COLORS)
    return {
        "color": _SERIES_COLORS[index % len(_SERIES_COLORS)],
        "linestyle": _SERIES_LINES[turn % len(_SERIES_LINES)],
        "marker": _SERIES_MARKERS[turn % len(_SERIES_MARKERS)],
    }


def shorter(name: str, length: int = 30) -> str:
    """`name`, with an ellipsis in its middle where it is longer than `length`."""
    end = length // 3
    return name if len(name) <= length else f"{name[: length - end - 1]}…{name[-end:]}"


def legend_names(names: Sequence[str]) -> list[str]:
    """The names as a legend shows them: long ones with an ellipsis in their middle, no two alike."""
    shown: list[str] = []
    for name in (literal(shorter(name, _LONGEST_NAME)) for name in names):
        # matplotlib hides what begins with a line.
        name = f" {name}" if name.startswith("_") else name
        number = sum(one == name or one.startswith(f"{name} (") for one in shown) + 1
        shown.append(name if number == 1 else f"{name} ({number})")
    return shown


def literal(text: str) -> str:
    """`text` for matplotlib, which would read what stands between two dollars as mathematics."""
    return text.replace("$", r"\$")


class Page:
    """A figure of rows of three panels, with a title above all, and one legend below the first row.

    Everything inside lies inside the figure: its height follows from the title and from the entries of the legend.
    """

    def __init__(self, title: str, labels: Sequence[str], rows: int):
        """`labels`: of the legend, as many as the lines that will be given to `draw_legend`."""
        self.figure: Figure = pyplot.figure(layout="constrained")
        widest = max((self._inches(label, STYLE["legend.fontsize"]) for label in labels), default=0) + _LEGEND_HANDLE
        self._columns = max(1, min(len(labels), int((WIDTH - 0.6) / widest)))
        legend_height = _LEGEND_ROW * math.ceil(len(labels) / self._columns) + 0.1
        heights = [4.0, legend_height, *[2.9] * (rows - 1)]
        lines = [literal(line) for line in textwrap.wrap(title, _TITLE_CHARACTERS)]
        # Names may consist of the widest letters.
        size = 13 * min(1, (WIDTH - 0.4) / self._inches("\n".join(lines), 13, "bold"))
        self.figure.set_size_inches(WIDTH, sum(heights) + 0.6 + 0.25 * len(lines))
        self._grid: GridSpec = self.figure.add_gridspec(len(heights), 3, height_ratios=heights)
        self.figure.suptitle("\n".join([*lines, ""]), x=0.01, ha="left", fontsize=size, fontweight="bold")

    def _inches(self, text: str, size: float, weight: str = "normal") -> float:
        """Width of a text of `size` points."""
        drawn = self.figure.text(0, 0, text, fontsize=size, fontweight=weight)
        width = drawn.get_window_extent().width / self.figure.dpi
        drawn.remove()
        return width

    def panel(self, row: int, first: int, columns: int = 1) -> Axes:
        """Empty axes in a row of panels, from column `first` (0 to 2) on."""
        return self.figure.add_subplot(self._grid[row + (row > 0), first : first + columns])

    def draw_legend(self, axes: Axes) -> None:
        """All that is labelled in `axes`, below the first row of panels."""
        place = self.figure.add_subplot(self._grid[1, :], label="legend")
        place.set_axis_off()
        handles, labels = axes.get_legend_handles_labels()
        place.legend(handles, labels, loc="center left", borderaxespad=0, ncols=self._columns, handlelength=3.2)

    def save(self, path: Path) -> None:
        """Write the picture (PNG) so that a reader sees the old one or the whole new one, and let go of it.

        Raises OSError where it cannot be written.
        """
        temporary = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with matplotlib.rc_context(STYLE):
                self.figure.savefig(temporary, dpi=110, format="png")
            temporary.replace(path)
        except OSError as error:
            raise OSError(f"{path} cannot be written ({error.strerror}); name another file with --output") from None
        finally:
            pyplot.close(self.figure)


def as_png(figure: Figure) -> bytes:
    """The picture as the bytes of a PNG file."""
    written = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(written, dpi=110, format="png")
    return written.getvalue()


def name_axes(axes: Axes, title: str, unit: str, x: str = "step") -> None:
    """Title, the quantity's unit beneath it in small print, and what the x axis counts."""
    axes.set_title(title, pad=18)
    axes.annotate(
        unit, (0, 1), xycoords="axes fraction", xytext=(0, 5), textcoords="offset points", color=MUTED, fontsize=8.5
    )
    axes.set_xlabel(x)
    if not axes.lines and not axes.collections:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=MUTED)


def legend_below(axes: Axes) -> None:
    """A legend in one row under the axes and what names them; none where nothing is labelled."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        under_the_name = offset_copy(axes.transAxes, axes.get_figure(root=True), y=-32, units="points")
        axes.legend(
            handles,
            labels,
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            bbox_transform=under_the_name,
            borderaxespad=0,
            ncols=len(handles),
        )


def logarithmic(axes: Axes, values: np.ndarray | Axes) -> None:
    """A logarithmic y axis, where there is a positive value to show. `values`: those of the axes, or the axes."""
    if isinstance(values, Axes):
        values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in values.lines] or [np.empty(0)])
    if (values[np.isfinite(values)] > 0).any():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def column(lines: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """The values of `key` as fp64, not a number where a line has none."""
    return numbers([line.get(key) for line in lines])


def numbers(values: Sequence[float | None]) -> np.ndarray:
    """fp64, not a number for None."""
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
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


def engineering(number: float) -> str:
    """A number for a title: 1.2k, 3.4M."""
    return EngFormatter(places=1, sep="")(number)

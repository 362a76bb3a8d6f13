"""The curves of compared runs, one small picture for each quantity, over steps, tokens or training FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from train.figure import STYLE, literal, logarithmic, name_axes, series_style, shorter
from train.report.runs import Axis, ComparedRun

# Inches; as wide as a phone, where a page shows one below the other.
PANEL_SIZE = (5.2, 3.5)
# So many held-out sets have a picture of their own; tables have all.
_MOST_SETS = 6


@dataclass(frozen=True)
class Curves:
    """One quantity of every run."""

    title: str
    unit: str
    # Completed steps, and the values after them.
    points: Callable[[ComparedRun], tuple[np.ndarray, np.ndarray]]
    logarithmic: bool = False
    # Whether the axis shows 0.
    from_zero: bool = False
    # Whether it says k for thousands.
    engineering: bool = False
    marker: str | None = None


def all_curves(runs: Sequence[ComparedRun]) -> list[Curves]:
    """Every quantity that a run among these has measured."""
    found = [
        Curves("Training loss", "nats per token, running mean", lambda run: run.figures("loss")),
        *(_held_out(name) for name in held_out_sets(runs)[:_MOST_SETS]),
        Curves("Learning rate", "of the latest step", lambda run: run.figures("learning_rate", is_smooth=False)),
        Curves(
            "Gradient norm",
            "global L2, before clipping, running mean",
            lambda run: run.figures("grad_norm"),
            logarithmic=True,
        ),
        Curves(
            "Throughput",
            "tokens per second, all processes, running mean",
            lambda run: run.figures("tokens_per_second"),
            from_zero=True,
            engineering=True,
        ),
        Curves("Memory", "GiB of one process", lambda run: run.figures("memory_gib", is_smooth=False), from_zero=True),
    ]
    return [curves for curves in found if any(np.isfinite(curves.points(run)[1]).any() for run in runs)]


def held_out_sets(runs: Sequence[ComparedRun]) -> list[str]:
    """The held-out sets that any run has scored: first those of most runs."""
    of_runs = [dict.fromkeys(line["set"] for line in run.evaluations) for run in runs]
    names = dict.fromkeys(name for of_run in of_runs for name in of_run)
    return sorted(names, key=lambda name: -sum(name in of_run for of_run in of_runs))


@matplotlib.rc_context(STYLE)
def curves_figure(curves: Curves, runs: Sequence[ComparedRun], axis: Axis) -> Figure:
    """One quantity of all runs over `axis`. Who is who, the page says once for all."""
    # No canvas of pyplot: nothing is left open behind a picture.
    figure = Figure(figsize=PANEL_SIZE)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        steps, values = curves.points(run)
        places = run.over(axis, steps)
        if (np.isfinite(places) & np.isfinite(values)).any():
            axes.plot(places, values, **series_style(number) | {"marker": curves.marker, "markersize": 4})
    if curves.logarithmic:
        logarithmic(axes, axes)
    if curves.from_zero:
        axes.set_ylim(bottom=0)
    if curves.engineering:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif not curves.logarithmic:
        axes.yaxis.set_major_formatter("{x:g}")
    if axis == "FLOPs":
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter("{x:.2g}")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    name_axes(axes, literal(curves.title), curves.unit, "training FLOPs" if axis == "FLOPs" else axis)
    return figure


def _held_out(name: str) -> Curves:
    return Curves(f"Held out: {shorter(name)}", "nats per token", lambda run: run.held_out(name), marker="o")

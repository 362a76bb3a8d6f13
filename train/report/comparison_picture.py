"""comparison.png: the curves of several runs in one picture, over the tokens that each had read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from train.figure import (
    STYLE,
    Page,
    column,
    legend_names,
    literal,
    logarithmic,
    name_axes,
    series_style,
    shorter,
    smooth,
)
from train.report.runs import ComparedRun

FILE_NAME = "comparison.png"


def draw(runs: Sequence[ComparedRun], path: Path) -> Path:
    """Draw the picture, and return its path. Raises as `comparison_picture` does."""
    comparison_picture(runs).save(path)
    return path


@matplotlib.rc_context(STYLE)
def comparison_picture(runs: Sequence[ComparedRun]) -> Page:
    """The picture of all runs that have logged a step.

    Raises ValueError where none has.
    """
    # As on the page, where runs without a step have a colour too.
    styles = [series_style(index) | {"marker": None} for index, run in enumerate(runs) if run.train]
    runs = [run for run in runs if run.train]
    if not runs:
        raise ValueError(
            "metrics.jsonl of all these runs has no logged step yet; let one of them take logging.interval steps"
        )
    names = legend_names([run.name for run in runs])
    labels = [f"{name}  {_last(run.train):.3f}" for name, run in zip(names, runs, strict=True)]
    page = Page(f"{len(runs)} runs, with the loss of their latest logged steps", labels, rows=2)
    losses, panels = page.panel(0, 0, columns=2), [page.panel(1, place) for place in range(3)]
    held_out = page.panel(0, 2)
    shared = _shared_set(runs)
    for run, style, label in zip(runs, styles, labels, strict=True):
        tokens = column(run.train, "tokens")
        losses.plot(tokens, smooth(column(run.train, "loss")), label=label, **style)
        if shared is not None:
            steps, scored = run.held_out(shared)
            held_out.plot(run.over("tokens", steps), scored, **style | {"marker": "o", "markersize": 4})
        for axes, key in zip(panels, ("learning_rate", "grad_norm", "tokens_per_second"), strict=True):
            values = column(run.train, key)
            axes.plot(tokens, values if key == "learning_rate" else smooth(values), **style)
    page.draw_legend(losses)
    _name_panels([losses, held_out, *panels], shared)
    return page


def _name_panels(panels: list[Axes], shared: str | None) -> None:
    losses, held_out, rates, norms, throughput = panels
    name_axes(losses, "Training loss", "nats per token, running mean", "tokens")
    name_axes(
        held_out,
        "Held-out loss",
        "the runs score no set of one name" if shared is None else f"nats per token of {literal(shorter(shared))}",
        "tokens",
    )
    name_axes(rates, "Learning rate", "of the latest step", "tokens")
    name_axes(norms, "Gradient norm", "global L2, before clipping, running mean", "tokens")
    name_axes(throughput, "Throughput", "tokens per second, all processes, running mean", "tokens")
    rates.yaxis.set_major_formatter("{x:g}")
    logarithmic(norms, norms)
    throughput.yaxis.set_major_formatter(EngFormatter())
    for axes in (rates, throughput):
        axes.set_ylim(bottom=0)
    for axes in panels:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _shared_set(runs: Sequence[ComparedRun]) -> str | None:
    """The first held-out set that all runs have scored."""
    found = [list(dict.fromkeys(line["set"] for line in run.evaluations)) for run in runs]
    return next((name for name in found[0] if all(name in others for others in found)), None)


def _last(lines: list[dict[str, Any]]) -> float:
    finite = [line["loss"] for line in lines if line["loss"] is not None]
    return finite[-1] if finite else float("nan")

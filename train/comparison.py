"""comparison.png: the curves of several runs in one picture, over the tokens that each had read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from train.callbacks.metrics_file import read_metrics
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

FILE_NAME = "comparison.png"
# As many as have a style of their own that the eye can tell from the others.
MOST_RUNS = 20


@dataclass(frozen=True)
class _Run:
    name: str
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    def held_out(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and losses of one held-out set."""
        steps, tokens = column(self.train, "step"), column(self.train, "tokens")
        of_set = [line for line in self.evaluations if line["set"] == name]
        # An evaluation knows its step alone.
        return column(of_set, "step") * (tokens[-1] / steps[-1]), column(of_set, "loss")


def draw_comparison(run_directories: Sequence[Path | str], output: Path | None = None) -> Path:
    """Draw comparison.png in the current folder, or `output`, and return its path. Raises as `comparison_page` does."""
    path = output or Path(FILE_NAME)
    comparison_page(run_directories).save(path)
    return path


@matplotlib.rc_context(STYLE)
def comparison_page(run_directories: Sequence[Path | str]) -> Page:
    """The picture of several runs.

    Raises FileNotFoundError when a folder has no metrics.jsonl; ValueError when one holds no logged step, or there are
    more than MOST_RUNS.
    """
    # A run that is named twice is one curve.
    folders = list({Path(folder).resolve(): Path(folder) for folder in run_directories}.values())
    if len(folders) > MOST_RUNS:
        raise ValueError(f"{len(folders)} runs are more than one picture shows; name at most {MOST_RUNS}")
    runs = [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    styles = [series_style(index) | {"marker": None} for index in range(len(runs))]
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
            held_out.plot(*run.held_out(shared), **style | {"marker": "o", "markersize": 4})
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


def _read(folder: Path, name: str) -> _Run:
    lines = read_metrics(folder)
    train = [line for line in lines if line["kind"] == "train"]
    if not train:
        raise ValueError(f"{folder}: metrics.jsonl has no logged step yet; let the run take logging.interval steps")
    return _Run(name, train, [line for line in lines if line["kind"] == "evaluation"])


def _names(folders: Sequence[Path]) -> list[str]:
    """What each folder is called, with as many of those around it as tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    names = ["/".join(parts[-1:]) for parts in paths]
    for length in range(2, max(map(len, paths), default=0) + 1):
        names = [
            "/".join(parts[-length:]) if names.count(name) > 1 else name
            for parts, name in zip(paths, names, strict=True)
        ]
    return names


def _shared_set(runs: Sequence[_Run]) -> str | None:
    """The first held-out set that all runs have scored."""
    found = [list(dict.fromkeys(line["set"] for line in run.evaluations)) for run in runs]
    return next((name for name in found[0] if all(name in others for others in found)), None)


def _last(lines: list[dict[str, Any]]) -> float:
    finite = [line["loss"] for line in lines if line["loss"] is not None]
    return finite[-1] if finite else float("nan")

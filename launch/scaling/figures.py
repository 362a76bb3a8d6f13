"""The pictures of a fit: IsoFLOP curves with their optima, optimal sizes and tokens, the Pareto front, residuals."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from launch.scaling.fit import GroupFit
from launch.scaling.isoflop import Axis, IsoFlop
from launch.scaling.predict import optimum
from launch.scaling.runs import ScalingRun
from train.figure import INK, MUTED, STYLE, WIDTH, legend_names, literal, name_axes, series_style

_COLUMNS = 3
_PANEL_HEIGHT = 3.4
_BUDGETS = matplotlib.colormaps["viridis"]


@matplotlib.rc_context(STYLE)
def isoflop_figure(fits: Sequence[GroupFit]) -> Figure:
    """A panel for each group: losses by size, a curve for each budget, a mark at its least loss."""
    figure, panels = _panels(len(fits))
    for axes, fit in zip(panels, fits, strict=True):
        budgets = [curve.budget for curve in fit.isoflop.curves]
        for place, curve in enumerate(fit.isoflop.curves):
            color = _BUDGETS(0.88 * place / max(1, len(budgets) - 1))
            sizes = np.array([run.parameters for run in curve.runs])
            axes.plot(sizes, [run.loss for run in curve.runs], ".", color=color, markersize=5)
            smooth = np.geomspace(sizes.min(), sizes.max(), 200)
            axes.plot(smooth, curve.losses(smooth), color=color, label=f"{curve.budget:.3g}")
            axes.plot(curve.optimal["parameters"], curve.least_loss, "*", color=INK, markersize=9)
        axes.set_xscale("log")
        name_axes(axes, literal(str(fit.group)), "held-out loss, nats per token; ★ least of each budget", "parameters")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if budgets:
            axes.legend(title="FLOPs", ncols=2, fontsize=7.5, loc="upper right")
    return figure


@matplotlib.rc_context(STYLE)
def optima_figure(fits: Sequence[GroupFit]) -> Figure:
    """Optimal sizes and tokens over FLOPs, with the power laws and their 95 % bands."""
    figure, (sizes, tokens) = _panels(2, columns=2, height=4.2)
    names = legend_names([str(fit.group) for fit in fits])
    panels: list[tuple[Axes, Axis]] = [(sizes, "parameters"), (tokens, "tokens")]
    for axes, axis in panels:
        for number, (fit, name) in enumerate(zip(fits, names, strict=True)):
            _draw_optima(axes, fit.isoflop, axis, number, name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    name_axes(sizes, "Optimal size N(C)", "parameters; bars and bands: 95 % intervals", "training FLOPs C")
    name_axes(tokens, "Optimal tokens D(C)", "tokens; bars and bands: 95 % intervals", "training FLOPs C")
    if any(fit.isoflop.curves for fit in fits):
        sizes.legend(loc="upper left")
    return figure


@matplotlib.rc_context(STYLE)
def pareto_figure(fits: Sequence[GroupFit]) -> Figure:
    """Losses over FLOPs, a panel for each context: every run, the runs that none of their family beats with fewer
    FLOPs, and the optimum of the fit of L(N, D)."""
    contexts = list(dict.fromkeys(fit.group.context for fit in fits))
    figure, panels = _panels(len(contexts))
    families = list(dict.fromkeys(fit.group.family for fit in fits))
    for axes, context in zip(panels, contexts, strict=True):
        for fit in (fit for fit in fits if fit.group.context == context):
            color = series_style(families.index(fit.group.family))["color"]
            _draw_front(axes, fit, color)
        axes.set_xscale("log")
        title = "Pareto front" if context is None else f"Pareto front, context {context:,}"
        name_axes(
            axes, title, "nats per token; steps: best runs; line, band: L(N, D) at its optimum", "training FLOPs C"
        )
        axes.legend()
    return figure


@matplotlib.rc_context(STYLE)
def residuals_figure(fits: Sequence[GroupFit]) -> Figure:
    """Fitted less measured log loss of every run over tokens per parameter, a panel for each group."""
    fitted = [fit for fit in fits if fit.model.loss_laws]
    figure, panels = _panels(len(fitted))
    for axes, fit in zip(panels, fitted, strict=True):
        ratios = [run.tokens / run.parameters for run in fit.runs]
        for number, law in enumerate(fit.model.loss_laws):
            style = series_style(number) | {"linestyle": "", "markersize": 3.5, "alpha": 0.7}
            axes.plot(ratios, 100 * law.residuals, label=law.name, **style)
        axes.axhline(0, color=MUTED, linewidth=1)
        axes.set_xscale("log")
        name_axes(axes, literal(str(fit.group)), "fitted over measured loss, per cent too high", "tokens per parameter")
        axes.legend()
    return figure


def pareto_front(runs: Sequence[ScalingRun]) -> list[ScalingRun]:
    """The runs that no other beats with as few FLOPs, by FLOPs."""
    front: list[ScalingRun] = []
    for run in sorted(runs, key=lambda run: (run.flops, run.loss)):
        if not front or run.loss < front[-1].loss:
            front.append(run)
    return front


def _draw_optima(axes: Axes, isoflop: IsoFlop, axis: Axis, number: int, name: str) -> None:
    color = series_style(number)["color"]
    if not isoflop.curves:
        return
    flops = np.array([curve.flops for curve in isoflop.curves])
    found = [curve.optimum(axis) for curve in isoflop.curves]
    values = np.array([optimum.value for optimum in found])
    bars = np.array([[at.value - at.low, at.high - at.value] for at in found]).T
    law = isoflop.laws.get(axis)
    label = name if law is None else f"{name}: C^{law.exponent_interval().written('.3f')}"
    axes.errorbar(flops, values, yerr=np.maximum(bars, 0), fmt="o", color=color, markersize=4, label=label)
    if law is not None:
        grid = np.geomspace(flops.min() / 2, flops.max() * 10, 60)
        at = [law.at(budget) for budget in grid]
        axes.plot(grid, [one.value for one in at], color=color)
        axes.fill_between(grid, [one.low for one in at], [one.high for one in at], color=color, alpha=0.18, linewidth=0)


def _draw_front(axes: Axes, fit: GroupFit, color: str) -> None:
    flops = np.array([run.flops for run in fit.runs])
    axes.plot(flops, [run.loss for run in fit.runs], ".", color=color, alpha=0.3, markersize=4)
    front = pareto_front(fit.runs)
    axes.step([run.flops for run in front], [run.loss for run in front], where="post", color=color, linewidth=1)
    law = fit.model.preferred_law
    if law is None:
        axes.plot([], [], color=color, label=literal(fit.group.family))
        return
    grid = np.geomspace(flops.min(), flops.max() * 3, 40)
    rows = np.vstack([law.coefficients, law.draws])
    losses = optimum(rows, fit.model.cost, grid)[2]
    axes.plot(grid, losses[0], color=color, linewidth=2, label=literal(fit.group.family))
    low, high = np.quantile(losses[1:], [law.tail, 1 - law.tail], axis=0)
    axes.fill_between(grid, low, high, color=color, alpha=0.18, linewidth=0)


def _panels(count: int, columns: int = _COLUMNS, height: float = _PANEL_HEIGHT) -> tuple[Figure, list[Axes]]:
    columns = min(columns, max(1, count))
    rows = -(-count // columns)
    # No canvas of pyplot: nothing is left open behind a picture.
    width = WIDTH / 2 if columns == 1 else WIDTH
    figure = Figure(figsize=(width, height * max(1, rows)))
    figure.set_layout_engine("constrained")
    panels = [figure.add_subplot(rows, columns, place + 1) for place in range(count)]
    return figure, panels

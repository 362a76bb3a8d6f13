"""One HTML page of a fit that needs no other file: figures, coefficients, comparison, what was left out, all runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from launch.scaling.compare import Comparison
from launch.scaling.figures import isoflop_figure, optima_figure, pareto_figure, residuals_figure
from launch.scaling.fit import FitSettings, GroupFit
from launch.scaling.intervals import Interval
from launch.scaling.runs import RunTable
from train.figure import as_png
from train.html_page import bullets, details, document, html_table, image, section


def as_html(table: RunTable, fits: Sequence[GroupFit], comparisons: Sequence[Comparison], settings: FitSettings) -> str:
    """The page. Figures are in it as PNG; nothing is fetched from anywhere."""
    sections = [
        _head(table, settings),
        section("IsoFLOP curves", _isoflop_text(fits), _image(isoflop_figure, fits)),
        section("Optimal size and tokens", _optima_table(fits), _image(optima_figure, fits)),
        section("L(N, D)", *_law_section(fits)),
        section("Families at equal compute", _comparison(comparisons)) if comparisons else "",
        section("Pareto front", _image(pareto_figure, fits)),
        section("Left out, and why", *_left_out(table, fits)),
        section("Runs", _runs(table)),
    ]
    return document("Scaling laws", sections)


def _head(table: RunTable, settings: FitSettings) -> str:
    return (
        f"<p>{len(table.used)} runs, {len(table.excluded)} excluded. N: parameters, D: training tokens, C: training "
        f"FLOPs. In brackets are 95 % intervals: from {settings.resamples} resamples of the runs for L(N, D), from "
        f"resampled residuals for IsoFLOP curves (seed {settings.seed}).</p>" + bullets(table.notes)
    )


def _isoflop_text(fits: Sequence[GroupFit]) -> str:
    rows = [
        [
            str(fit.group),
            f"{curve.budget:.3g}",
            str(len(curve.runs)),
            _cell(curve.optimum("parameters"), ".3g"),
            _cell(curve.optimum("tokens"), ".3g"),
            f"{curve.least_loss:.4f}",
        ]
        for fit in fits
        for curve in fit.isoflop.curves
    ]
    text = "<p>At each budget a parabola of the log loss by ln N, and one by ln D (arXiv 2203.15556, section 3.2).</p>"
    return text + html_table(["runs of", "budget, FLOPs", "runs", "optimal N", "optimal D", "least loss"], rows)


def _optima_table(fits: Sequence[GroupFit]) -> str:
    rows = []
    for fit in fits:
        for axis, letter in (("parameters", "N"), ("tokens", "D")):
            law = next((law for name, law in fit.isoflop.laws.items() if name == axis), None)
            if law is not None:
                factor = f"{math.exp(law.log_factor):.4g}"
                rows.append([str(fit.group), f"{letter}(C)", factor, _cell(law.exponent_interval(), ".4f")])
    text = "<p>Power laws through the optima: optimum = factor × C^exponent.</p>"
    return text + html_table(["runs of", "optimum", "factor", "exponent"], rows) if rows else text + _none()


def _law_section(fits: Sequence[GroupFit]) -> list[str]:
    laws = [(fit, law) for fit in fits for law in fit.model.loss_laws]
    text = (
        "<p>L = E + (A N<sup>−alpha</sup> + B D<sup>−beta</sup>)<sup>gamma</sup>, gamma 1 or fitted; Huber loss of log "
        "losses, L-BFGS. a and b are the exponents of N and D at the optimum where C ~ N D (arXiv 2203.15556, section "
        "3.3). Starts: how many of them found this fit. Residuals are shares of the loss.</p>"
    )
    if not laws:
        return [text, _none()]
    names = list(dict.fromkeys(name for _, law in laws for name in law.figures()))
    rows = []
    for fit, law in laws:
        figures = law.figures()
        cells = [_cell(figures[name], ".4g") if name in figures else "1" for name in names]
        spread = f"{100 * (law.residuals**2).mean() ** 0.5:.2f} %"
        rows.append([str(fit.group), law.name, *cells, spread, f"{law.starts[0]} of {law.starts[1]}"])
    return [text, html_table(["runs of", "fit", *names, "residual", "starts"], rows), _image(residuals_figure, fits)]


def _comparison(comparisons: Sequence[Comparison]) -> str:
    text = (
        "<p>At each budget that both families have a curve of: the loss of the first less that of the second, negative "
        "where the first is better. Compute ratio: how many times the budget the second needs for the loss of the "
        "first.</p>"
    )
    rows = [
        [
            f"{found.first} − {found.second}",
            "" if found.context is None else f"{found.context:,}",
            f"{found.budget:.3g}",
            _cell(found.gap, ".4f"),
            "" if found.fitted_gap is None else _cell(found.fitted_gap, ".4f"),
            "" if found.compute_ratio is None else _cell(found.compute_ratio, ".3g"),
        ]
        for found in comparisons
    ]
    return text + html_table(["families", "context", "budget", "gap, IsoFLOP", "gap, L(N, D)", "compute ratio"], rows)


def _left_out(table: RunTable, fits: Sequence[GroupFit]) -> list[str]:
    fits_list = bullets(f"{fit.group}: {why}" for fit in fits for why in fit.not_fitted)
    runs_list = bullets(f"{run.run}: {run.excluded}" for run in table.excluded)
    return [
        "<h3>Fits</h3>",
        fits_list or "<p>Everything was fitted.</p>",
        "<h3>Runs</h3>",
        runs_list or "<p>No run was excluded.</p>",
    ]


def _runs(table: RunTable) -> str:
    rows = [
        [
            run.run,
            run.family,
            "" if run.context is None else f"{run.context:,}",
            _number(run.parameters, ",.0f"),
            _number(run.tokens, ",.0f"),
            _number(run.flops, ".4g"),
            "" if run.budget is None else f"{run.budget:.3g}",
            _number(run.loss, ".4f"),
            run.excluded,
        ]
        for run in table.runs
    ]
    heads = ["run", "family", "context", "parameters", "tokens", "FLOPs", "budget", "loss", "excluded"]
    return details(f"All {len(rows)} runs", html_table(heads, rows))


def _image(draw: Callable[[Sequence[GroupFit]], Figure], fits: Sequence[GroupFit]) -> str:
    return image(as_png(draw(fits)), (draw.__doc__ or "").split("\n\n")[0])


def _cell(found: Interval, places: str) -> str:
    return found.written(places)


def _number(value: float, places: str) -> str:
    return "" if math.isnan(value) else format(value, places)


def _none() -> str:
    return '<p class="small">Too few runs; what is missing stands below.</p>'

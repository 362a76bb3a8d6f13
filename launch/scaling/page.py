"""One HTML page of a fit that needs no other file: figures, coefficients, comparison, what was left out, all runs."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from matplotlib.figure import Figure

from launch.scaling.compare import Comparison
from launch.scaling.figures import as_png, isoflop_figure, optima_figure, pareto_figure, residuals_figure
from launch.scaling.fit import FitSettings, GroupFit
from launch.scaling.intervals import Interval
from launch.scaling.runs import RunTable

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22272e; max-width: 1200px; margin: 2em auto; padding: 0 1em; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13.5px; }
th, td { padding: 3px 12px 3px 0; text-align: left; border-bottom: 1px solid #e6e9ee; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: #6b7480; font-weight: 600; }
img { max-width: 100%; } .small { color: #6b7480; font-size: 13.5px; }
"""


def as_html(table: RunTable, fits: Sequence[GroupFit], comparisons: Sequence[Comparison], settings: FitSettings) -> str:
    """The page. Figures are in it as PNG; nothing is fetched from anywhere."""
    sections = [
        _head(table, settings),
        _section("IsoFLOP curves", _isoflop_text(fits), _image(isoflop_figure, fits)),
        _section("Optimal size and tokens", _optima_table(fits), _image(optima_figure, fits)),
        _section("L(N, D)", *_law_section(fits)),
        _section("Families at equal compute", _comparison(comparisons)) if comparisons else "",
        _section("Pareto front", _image(pareto_figure, fits)),
        _section("Left out, and why", *_left_out(table, fits)),
        _section("Runs", _runs(table)),
    ]
    title = "Scaling laws"
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def _head(table: RunTable, settings: FitSettings) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return (
        f"<p>{len(table.used)} runs, {len(table.excluded)} excluded. N: parameters, D: training tokens, C: training "
        f"FLOPs. In brackets are 95 % intervals: from {settings.resamples} resamples of the runs for L(N, D), from "
        f"resampled residuals for IsoFLOP curves (seed {settings.seed}).</p>" + (f"<ul>{notes}</ul>" if notes else "")
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
    return text + _table(["runs of", "budget, FLOPs", "runs", "optimal N", "optimal D", "least loss"], rows)


def _optima_table(fits: Sequence[GroupFit]) -> str:
    rows = []
    for fit in fits:
        for axis, letter in (("parameters", "N"), ("tokens", "D")):
            law = next((law for name, law in fit.isoflop.laws.items() if name == axis), None)
            if law is not None:
                factor = f"{math.exp(law.log_factor):.4g}"
                rows.append([str(fit.group), f"{letter}(C)", factor, _cell(law.exponent_interval(), ".4f")])
    text = "<p>Power laws through the optima: optimum = factor × C^exponent.</p>"
    return text + _table(["runs of", "optimum", "factor", "exponent"], rows) if rows else text + _none()


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
    return [text, _table(["runs of", "fit", *names, "residual", "starts"], rows), _image(residuals_figure, fits)]


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
    return text + _table(["families", "context", "budget", "gap, IsoFLOP", "gap, L(N, D)", "compute ratio"], rows)


def _left_out(table: RunTable, fits: Sequence[GroupFit]) -> list[str]:
    fits_text = [f"<li>{escape(str(fit.group))}: {escape(why)}</li>" for fit in fits for why in fit.not_fitted]
    runs_text = [f"<li>{escape(run.run)}: {escape(run.excluded)}</li>" for run in table.excluded]
    fits_list = f"<ul>{''.join(fits_text)}</ul>" if fits_text else "<p>Everything was fitted.</p>"
    runs_list = f"<ul>{''.join(runs_text)}</ul>" if runs_text else "<p>No run was excluded.</p>"
    return ["<h3>Fits</h3>", fits_list, "<h3>Runs</h3>", runs_list]


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
    return f"<details><summary>All {len(rows)} runs</summary>{_table(heads, rows)}</details>"


def _section(title: str, *parts: str) -> str:
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(parts)


def _image(draw: Callable[[Sequence[GroupFit]], Figure], fits: Sequence[GroupFit]) -> str:
    encoded = base64.b64encode(as_png(draw(fits))).decode("ascii")
    description = (draw.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return f'<img alt="{escape(" ".join(description.split()))}" src="data:image/png;base64,{encoded}">'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "\n".join("<tr>" + "".join(_column(cell) for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _column(text: str) -> str:
    is_number = text.lstrip("-")[:1].isdigit()
    return f'<td class="number">{escape(text)}</td>' if is_number else f"<td>{escape(text)}</td>"


def _cell(found: Interval, places: str) -> str:
    return found.written(places)


def _number(value: float, places: str) -> str:
    return "" if math.isnan(value) else format(value, places)


def _none() -> str:
    return '<p class="small">Too few runs; what is missing stands below.</p>'

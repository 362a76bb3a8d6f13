"""comparison.html: one page that compares runs and needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from train.figure import STYLE, as_png, series_style
from train.html_page import bullets, details, document, html_table, image, section
from train.report import tables
from train.report.curves import PANEL_SIZE, all_curves, curves_figure
from train.report.monitors import Series, depth_of, draw_depth, panels_of
from train.report.runs import Axis, ComparedRun
from train.run_directory import write_atomically

FILE_NAME = "comparison.html"
# A click on one shows its curves and hides the others'.
_AXES: tuple[Axis, ...] = ("tokens", "steps", "FLOPs")
_STYLE = """
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 8px; }
.curves { display: none; }
input[name=axis] + label { margin-right: 1em; }
ul.runs { list-style: none; padding: 0; } ul.runs li { display: inline-block; margin-right: 1.5em; }
ul.runs svg { vertical-align: middle; }
@media print { .curves { display: block !important; } input[name=axis], input[name=axis] + label { display: none; } }
""" + "".join(f"#over-{axis}:checked ~ .over-{axis} {{ display: block; }}\n" for axis in _AXES)


def write(runs: Sequence[ComparedRun], path: Path) -> Path:
    """Write the page, and return its path. Raises OSError where it cannot be written."""
    text = as_html(runs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}); name another file with --output") from None
    return path


def as_html(runs: Sequence[ComparedRun]) -> str:
    """The page. Pictures are in it as PNG; nothing is fetched from anywhere, and no script runs."""
    title = f"{len(runs)} runs" if len(runs) > 1 else f"Run {runs[0].name}"
    sections = [
        _names(runs),
        _broken(runs),
        section("Runs", _table(runs, tables.overview(runs))),
        section("Curves", _curves(runs)),
        section("Losses", _table(runs, tables.losses(runs), "nats per token; the latest of each run")),
    ]
    if evaluated := tables.evaluations(runs):
        note = "Losses in nats per token, by python -m train.evaluate"
        sections.append(section("Evaluations", _table(runs, evaluated, note)))
    for suite, rows in tables.suites(runs).items():
        sections.append(section(f"Suite {suite}", _table(runs, rows, "By python -m train.evaluate; the latest result")))
    sections += [
        section("Stability", _table(runs, tables.stability(runs)), *map(_monitors, runs)),
        section("Speed and memory", _table(runs, tables.throughput(runs), "Medians over logged steps; most memory")),
    ]
    if len(runs) > 1:
        sections.append(section("Configuration", _configuration(runs)))
    return document(title, sections, _STYLE)


def _names(runs: Sequence[ComparedRun]) -> str:
    items = "".join(f"<li>{_line(number)} {escape(run.name)}</li>" for number, run in enumerate(runs))
    return f'<ul class="runs">{items}</ul>'


def _line(number: int) -> str:
    """The line of run `number` in the curves."""
    style = series_style(number)
    dashes = "" if style["linestyle"] == "-" else " ".join(f"{2 * length:g}" for length in style["linestyle"][1])
    return (
        '<svg width="34" height="8" aria-hidden="true"><line x1="0" y1="4" x2="34" y2="4" stroke-width="2.5" '
        f'stroke="{style["color"]}" stroke-dasharray="{dashes}"/></svg>'
    )


def _broken(runs: Sequence[ComparedRun]) -> str:
    found = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    found += [f"{run.name}: has no logged step yet, and no curves" for run in runs if not run.train]
    found += [
        f"{run.name}: has no curves over FLOPs, its configuration does not say how large its model is"
        for run in runs
        if run.train and run.flops_per_token is None
    ]
    return section("What could not be read", bullets(found)) if found else ""


def _curves(runs: Sequence[ComparedRun]) -> str:
    curves = all_curves(runs)
    if not curves:
        return "<p>No run has logged a step.</p>"
    choice = "over: " + "".join(
        f'<input type="radio" name="axis" id="over-{axis}"{" checked" * (axis == _AXES[0])}>'
        f'<label for="over-{axis}"> {"training FLOPs" if axis == "FLOPs" else axis}</label>'
        for axis in _AXES
    )
    parts = []
    for axis in _AXES:
        pictures = [
            image(as_png(curves_figure(one, runs, axis)), f"{one.title} over {axis}, {one.unit}") for one in curves
        ]
        parts.append(f'<div class="curves over-{axis}">{_grid(pictures)}</div>')
    return f"<div>{choice}{''.join(parts)}</div>"


def _grid(pictures: Sequence[str]) -> str:
    return f'<div class="panels">{"".join(f"<div>{picture}</div>" for picture in pictures)}</div>'


@matplotlib.rc_context(STYLE)
def _monitors(run: ComparedRun) -> str:
    """What the layers of one run have reported, behind a click; nothing where they have not."""
    statistics = Series(run.statistics, run.profiles)
    if not panels_of(statistics):
        return ""
    depth = depth_of(statistics)
    pictures = []
    for panel in panels_of(statistics):
        figure = Figure(figsize=PANEL_SIZE)
        figure.set_layout_engine("constrained")
        axes = figure.add_subplot()
        panel.draw(axes, statistics, depth)
        if panel.is_by_block:
            draw_depth(figure, [axes], depth)
        if axes.has_data():
            pictures.append(image(as_png(figure), f"{axes.get_title('left')} of the layers of {run.name}"))
    return details(f"Layers of {run.name}", _grid(pictures))


def _table(runs: Sequence[ComparedRun], rows: Sequence[tables.Row], note: str = "") -> str:
    if not rows:
        return "<p>Nothing was measured.</p>"
    text = f'<p class="small">{escape(note)}</p>' if note else ""
    return text + html_table(["", *(run.name for run in runs)], rows)


def _configuration(runs: Sequence[ComparedRun]) -> str:
    if sum(run.configuration is not None for run in runs) < 2:
        return "<p>Fewer than two of these runs have a configuration that can be read.</p>"
    rows = tables.configuration(runs)
    return _table(runs, rows, "Only what differs.") if rows else "<p>Their configurations do not differ.</p>"

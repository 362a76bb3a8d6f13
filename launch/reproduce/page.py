"""One HTML page of a reproduction that needs no other file: our table beside the published one, sources, how it ran."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from launch.reproduce.config import ReproduceConfig
from launch.reproduce.published import PUBLISHED, TOLERANCE
from launch.reproduce.table import Cell, rows_of

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22272e; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; }
th, td { padding: 3px 12px 3px 0; text-align: left; border-bottom: 1px solid #e6e9ee; white-space: nowrap; }
th { color: #6b7480; font-weight: 600; } td { font-variant-numeric: tabular-nums; }
tr.differs td { background: #fff1e5; } tr.as-published td { background: #eef8f0; }
.small { color: #6b7480; font-size: 13.5px; }
"""


def as_html(config: ReproduceConfig, found: Sequence[Cell], missing: Sequence[str]) -> str:
    """The page. `missing`: runs that are not scored, with what is known of each."""
    title = f"Reproduction: {config.name}"
    sections = [_head(config), _table(config, found), _sources(config, found), _missing(missing)]
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _head(config: ReproduceConfig) -> str:
    rates = ", ".join(f"{rate:g}" for rate in config.learning_rates)
    seeds = ", ".join(map(str, config.seeds))
    return (
        f"<p>{config.steps:,} steps a run, experiment <code>{escape(config.experiment)}</code>, learning rates "
        f"{rates}, seeds {seeds}. Of the rates, the best of each model and task. Numbers are accuracies by the length "
        "of the examples, means over the seeds, with the least and the most in brackets; scaled: the mean over the "
        "lengths of (accuracy − chance) / (1 − chance).</p>"
    )


def _table(config: ReproduceConfig, found: Sequence[Cell]) -> str:
    heads, rows = rows_of(config, found)
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "\n".join(
        f'<tr class="{cell.verdict.replace(" ", "-")}">' + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>"
        for cell, row in zip(found, rows, strict=True)
    )
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def _sources(config: ReproduceConfig, found: Sequence[Cell]) -> str:
    if config.published is None:
        return ""
    sources = dict.fromkeys(cell.published.source for cell in found if cell.published is not None)
    lines = [*sources, *PUBLISHED[config.published].remarks]
    rule = f"<p>A scaled accuracy differs where it is more than {TOLERANCE:g} away.</p>"
    return "<h2>Published</h2>\n" + rule + "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _missing(missing: Sequence[str]) -> str:
    if not missing:
        return '<p class="small">Every run is trained to its end and scored.</p>'
    return "<h2>Not scored yet</h2>\n<ul>" + "".join(f"<li>{escape(line)}</li>" for line in missing) + "</ul>"

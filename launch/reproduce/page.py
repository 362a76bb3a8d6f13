"""One HTML page of a reproduction that needs no other file: our table beside the published one, sources, how it ran."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from launch.reproduce.config import ReproduceConfig
from launch.reproduce.published import PUBLISHED, TOLERANCE
from launch.reproduce.table import Cell, rows_of
from train.html_page import bullets, document, html_table, section

_STYLE = "tr.differs td { background: #fff1e5; } tr.as-published td { background: #eef8f0; }"


def as_html(config: ReproduceConfig, found: Sequence[Cell], missing: Sequence[str]) -> str:
    """The page. `missing`: runs that are not scored, with what is known of each."""
    heads, rows = rows_of(config, found)
    table = html_table(heads, rows, [cell.verdict.replace(" ", "-") for cell in found])
    sections = [_head(config), table, *_sources(config, found), _missing(missing)]
    return document(f"Reproduction: {config.name}", sections, _STYLE)


def _head(config: ReproduceConfig) -> str:
    rates = ", ".join(f"{rate:g}" for rate in config.learning_rates)
    seeds = ", ".join(map(str, config.seeds))
    return (
        f"<p>{config.steps:,} steps a run, experiment <code>{escape(config.experiment)}</code>, learning rates "
        f"{rates}, seeds {seeds}. Of the rates, the best of each model and task. Numbers are accuracies by the length "
        "of the examples, means over the seeds, with the least and the most in brackets; scaled: the mean over the "
        "lengths of (accuracy − chance) / (1 − chance).</p>"
    )


def _sources(config: ReproduceConfig, found: Sequence[Cell]) -> list[str]:
    if config.published is None:
        return []
    sources = dict.fromkeys(cell.published.source for cell in found if cell.published is not None)
    rule = f"<p>A scaled accuracy differs where it is more than {TOLERANCE:g} away.</p>"
    return [section("Published", rule, bullets([*sources, *PUBLISHED[config.published].remarks]))]


def _missing(missing: Sequence[str]) -> str:
    if not missing:
        return '<p class="small">Every run is trained to its end and scored.</p>'
    return section("Not scored yet", bullets(missing))

"""Parts of an HTML page that is one file: nothing in it is fetched, and a phone shows it without scrolling sideways."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

# Tables of more columns have no room beside each other on a desk either.
_MOST_COLUMNS = 9
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22272e; max-width: 1200px; margin: 2em auto; padding: 0 1em;
  overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13.5px; }
th, td { padding: 3px 12px 3px 0; text-align: left; border-bottom: 1px solid #e6e9ee; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
th { color: #6b7480; font-weight: 600; }
img { max-width: 100%; } .small { color: #6b7480; font-size: 13.5px; }
@media (min-width: 701px) { td.number { white-space: nowrap; } table.stacked td.number { white-space: normal; } }
"""
# A row becomes a block that names its columns: its first cell is the heading of the others.
_STACKED = """
TABLE, TABLE tbody, TABLE tr, TABLE td { display: block; }
TABLE tr:first-child { display: none; }
TABLE tr { padding: 6px 0; border-bottom: 1px solid #e6e9ee; }
TABLE td, TABLE td.number { display: flex; gap: 1em; justify-content: space-between; text-align: right; border: 0;
  padding: 1px 0; }
TABLE td:first-child { display: block; text-align: left; font-weight: 600; }
TABLE td:not(:first-child)::before { content: attr(data-column); color: #6b7480; text-align: left; flex: none;
  max-width: 60%; }
TABLE td:empty { display: none; }
"""


def document(title: str, sections: Iterable[str], style: str = "") -> str:
    """A whole page; `style`: rules beside those that all pages have."""
    stacked = _STACKED.replace("TABLE", "table.stacked")
    on_phones = f"@media (max-width: 700px) {{{_STACKED.replace('TABLE', 'table')}}}"
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}{stacked}{on_phones}{style}</style></head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading, and what stands under it (HTML)."""
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(parts)


def details(summary: str, *parts: str) -> str:
    """What a click on `summary` shows (HTML)."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>"


def bullets(texts: Iterable[str]) -> str:
    """A list of texts; nothing where there is none."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def image(picture: bytes, description: str) -> str:
    """A PNG inside the page; `description`: for those who do not see it."""
    encoded = base64.b64encode(picture).decode("ascii")
    return f'<img alt="{escape(" ".join(description.split()))}" src="data:image/png;base64,{encoded}">'


def html_table(heads: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str] = ()) -> str:
    """Texts under headings. A cell that begins with a digit is a number and stands at the right.

    `marks`: of each row, a class that the page's style knows; none: rows look alike.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "\n".join(
        f"<tr{mark}>" + "".join(_cell(name, text) for name, text in zip(heads, row, strict=True)) + "</tr>"
        for mark, row in zip([f' class="{escape(mark)}"' for mark in marks] or [""] * len(rows), rows, strict=True)
    )
    kind = ' class="stacked"' if len(heads) > _MOST_COLUMNS else ""
    return f"<table{kind}>\n<tr>{head}</tr>\n{body}\n</table>"


def _cell(column: str, text: str) -> str:
    kind = ' class="number"' if text.lstrip("-−")[:1].isdigit() else ""
    return f'<td{kind} data-column="{escape(column)}">{escape(text)}</td>'

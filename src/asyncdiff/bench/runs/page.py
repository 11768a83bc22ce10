"""A result as one self-contained HTML page: plots, tables, machine, versions, command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from asyncdiff.bench.runs.figures import BenchResult
from asyncdiff.bench.runs.plots import data_uri, plots
from asyncdiff.bench.runs.tables import Table, machine_rows, tables

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 64rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.wide { overflow-x: auto; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.facts th, .facts td { text-align: left; white-space: normal; vertical-align: top; }
.note { color: #666; font-size: .85rem; max-width: 48rem; }
"""


def page(result: BenchResult) -> str:
    """The page of a benchmark."""
    images = {name: data_uri(figure) for name, figure in plots(result).items()}
    return document(f"asyncdiff bench: {result.title}", images, tables(result), machine_rows(result))


def document(
    title: str, images: Mapping[str, str], tables: Sequence[Table], facts: Sequence[tuple[str, str]]
) -> str:
    """A page of pictures (title -> data URI), tables and facts. Nothing in it is fetched from elsewhere."""
    return "\n".join(_lines(escape(title), images, tables, facts)) + "\n"


def _lines(
    title: str, images: Mapping[str, str], tables: Sequence[Table], facts: Sequence[tuple[str, str]]
) -> Iterator[str]:
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>"
    for name, uri in images.items():
        yield f'<h2>{escape(name)}</h2>\n<img alt="{escape(name)}" src="{uri}">'
    for table in tables:
        yield from _table(table)
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    yield f'<h2>How it was measured</h2>\n<table class="facts">{rows}</table>\n</body>\n</html>'


def _table(table: Table) -> Iterator[str]:
    yield f"<h2>{escape(table.title)}</h2>"
    heads = "".join(f"<th>{escape(head)}</th>" for head in table.heads)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows
    )
    yield f'<div class="wide"><table><thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>'
    if table.note:
        yield f'<p class="note">{escape(table.note)}</p>'

"""What is shown while a command works: progress on stderr, results on stdout, each thing once."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from asyncdiff.bench.progress import Progress as Report

if TYPE_CHECKING:
    from asyncdiff.bench.runs.tables import Table as FiguresTable


def print_table(title: str, rows: Sequence[tuple[str, str, str]]) -> None:
    """Print (what, value, note) rows on stdout; whole lines, however narrow the terminal or the pipe is."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def print_report(
    tables: Sequence[FiguresTable], facts: Sequence[tuple[str, str]], written: Sequence[Path]
) -> None:
    """Print tables with what their figures mean, how they were measured, and the files written."""
    from asyncdiff.bench.command import show_table

    for table in tables:
        if len(table.heads) == 2:  # a reason may take several lines
            print_table(f"\n{table.title}", [(what, "", why) for what, why in table.rows])
        else:
            show_table(f"\n{table.title}", table.heads, table.rows)
        if table.note:
            typer.echo(table.note)
    rows = [(name, "", value) for name, value in facts]
    print_table("\nHow it was measured", [*rows, *(("written", "", str(path)) for path in written)])


@contextmanager
def progress(first: str) -> Iterator[Report]:
    """A bar on stderr that follows (what is being done, done, total); total 0 when nobody knows.

    One line, rewritten, and gone when the work is done. Without a terminal, one line per new thing.
    """
    if not sys.stderr.isatty():
        yield _LineReport()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
    with bar:
        yield _BarReport(bar, bar.add_task(first, total=None))


class _BarReport:
    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar = bar
        self._task = task

    def __call__(self, what: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=what, completed=done, total=total or None)


class _LineReport:
    def __init__(self) -> None:
        self._last = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._last:
            self._last = what
            typer.echo(f"{what} ...", err=True)


def quiet_libraries() -> None:
    """Silence the log lines, bars and warnings of other libraries; ours stay, one line each.

    Download bars of the hub stay too: nothing else says why the command is waiting.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # warns after a fork otherwise
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.simplefilter("always")
    warnings.showwarning = _show_ours


def _show_ours(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if _raised_by().startswith("asyncdiff."):
        typer.echo(f"Warning: {' '.join(str(message).split())}", err=True)


def _raised_by() -> str:
    """The module that called `warnings.warn`; the file name that a warning carries is often another."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals["__name__"] in (__name__, "warnings"):
        frame = frame.f_back
    return "" if frame is None else str(frame.f_globals["__name__"])

"""What the modules of this package that are run as `python -m asyncdiff.bench.NAME` have in common.

Nothing here imports torch, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from asyncdiff.errors import AsyncDiffError, ConfigurationError


def _check_json(path: Path | None) -> Path | None:
    """That the figures can be written when they are there."""
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {path.parent} does not exist")
    return path


JsonOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        dir_okay=False,
        writable=True,
        callback=_check_json,
        help="Also write the figures to this JSON file.",
    ),
]
DevicesOption: TypeAlias = Annotated[
    str, typer.Option("--devices", metavar="LIST", help="Device names, separated by commas.")
]
DtypeOption: TypeAlias = Annotated[
    str, typer.Option("--dtype", metavar="float32|bfloat16|float16", help="Of the weights.")
]

TimedDtypeOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="auto|float32|bfloat16|float16",
        help="Of the weights; 'auto' is bfloat16, or float32 on CPUs that cannot compute it.",
    ),
]


def run_command(command: Callable[..., None]) -> None:
    """Run as a command of its own; a mistake in the arguments is one line and exit code 2, a worker that
    fails one line and exit code 1."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        app()
    except ConfigurationError as error:
        typer.echo(f"Error: {error}", err=True)
        raise SystemExit(2) from error
    except AsyncDiffError as error:
        typer.echo(f"Error: {error}", err=True)
        raise SystemExit(1) from error


def check_dtype(name: str) -> None:
    """`ConfigurationError` for what is no dtype of weights."""
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigurationError(f"--dtype {name}: must be float32, bfloat16 or float16.")


def timed_dtype(name: str, devices: Sequence[str]) -> str:
    """Of weights that are computed with on these devices: `name`, or what "auto" stands for there."""
    if name != "auto":
        check_dtype(name)
    from asyncdiff.bench.workload import dtype_of_random_weights

    return dtype_of_random_weights(name, devices)


def check_at_least(option: str, value: float, least: float) -> None:
    """`ConfigurationError` for less."""
    if value < least:
        raise ConfigurationError(f"{option} {value:g}: must be {least:g} or more.")


def finish(module: str, measured: dict[str, Any], json_file: Path | None) -> None:
    """Write the figures with machine, versions and command, if a file was asked for."""
    if json_file is None:
        return
    from asyncdiff.bench.environment import describe_environment

    everything = measured | {
        "environment": describe_environment(),
        "command": " ".join([f"python -m asyncdiff.bench.{module}", *sys.argv[1:]]),
    }
    json_file.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")


def show_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print on stdout; whole lines, however narrow the terminal or the pipe is."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(head, no_wrap=True, justify="left" if head == heads[0] else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    whole = Measurement.get(console, console.options.update(width=10_000), table).maximum
    console.width = max(console.width, whole)
    console.print(table)

"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from asyncdiff import __version__
from asyncdiff.cli import bench, demo, doctor, generate, plan, quality
from asyncdiff.cli.arguments import DebugOption


def build_app() -> typer.Typer:
    """The command line with all its commands; running it raises instead of exiting (see `failures.run`)."""
    app = typer.Typer(name="asyncdiff", add_completion=False, pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True)(_root)
    app.command("demo")(demo.demo)
    app.command("generate")(generate.generate)
    app.command("plan")(plan.plan)
    app.add_typer(bench.build_app(), name="bench")
    app.command("quality")(quality.quality)
    app.command("doctor")(doctor.doctor)
    return app


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"asyncdiff {__version__}")
        raise typer.Exit()


def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """One diffusion generation on several devices at the same time."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())

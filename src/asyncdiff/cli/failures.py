"""Exit codes, and one line on stderr for whatever went wrong."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence

import typer

from asyncdiff.errors import AsyncDiffError, ConfigurationError

FAILED = 1
BAD_USAGE = 2
INTERRUPTED = 130
DEBUG_VARIABLE = "ASYNCDIFF_DEBUG"
_MAX_CHARACTERS = 1000


def run(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run `app`, return the exit code; every failure is one line on stderr (--debug: a traceback too)."""
    try:
        code = app(args=list(arguments), prog_name="asyncdiff", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except typer.TyperException as error:  # what typer itself finds wrong with the arguments
        return _report(error, error.format_message().replace("Value error, ", ""), error.exit_code)
    except ConfigurationError as error:
        return _report(error, str(error), BAD_USAGE)
    except (AsyncDiffError, OSError) as error:
        return _report(error, str(error) or type(error).__name__, FAILED)
    except Exception as error:  # noqa: BLE001  the last line of defence: a user gets a sentence, not a traceback
        hint = f"Run again with --debug (or {DEBUG_VARIABLE}=1) for the traceback."
        return _report(error, f"{type(error).__name__}: {one_line(str(error))} {hint}", FAILED)
    if code == INTERRUPTED:
        typer.echo("Interrupted.", err=True)
    return code if isinstance(code, int) else 0


def one_line(text: str) -> str:
    """`text` without line breaks, and cut where nobody reads on."""
    joined = " ".join(text.split())
    return joined if len(joined) <= _MAX_CHARACTERS else joined[: _MAX_CHARACTERS - 4] + " ..."


def _report(error: BaseException, message: str, code: int) -> int:
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    typer.echo(f"Error: {one_line(message)}", err=True)
    return code

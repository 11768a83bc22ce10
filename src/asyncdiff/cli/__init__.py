"""The command `asyncdiff`: one module per command.

No command module imports torch or diffusers at its top, so that `--help` and bad arguments answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (default: `sys.argv[1:]`) and leave the process with its exit code.

    0: done. 1: it failed. 2: it was asked for in a way that cannot be done. 130: interrupted.
    """
    from asyncdiff.cli.app import build_app
    from asyncdiff.cli.failures import run

    sys.exit(run(build_app(), sys.argv[1:] if arguments is None else arguments))

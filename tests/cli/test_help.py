"""`--help` and `--version` answer at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMANDS: list[list[str]] = [
    [],
    ["demo"],
    ["generate"],
    ["doctor"],
    ["bench"],
    ["bench", "step"],
    ["quality"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "asyncdiff")
def test_help_loads_no_torch(command: list[str]) -> None:
    code = (
        "import sys\nfrom asyncdiff.cli import main\n"
        f"try: main({[*command, '--help']!r})\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Usage: asyncdiff" in done.stdout


def test_group_without_command_shows_its_help() -> None:
    arguments = [sys.executable, "-m", "asyncdiff"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "Commands" in done.stdout


def test_version() -> None:
    import asyncdiff

    arguments = [sys.executable, "-m", "asyncdiff", "--version"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"asyncdiff {asyncdiff.__version__}\n", "")

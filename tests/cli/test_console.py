"""What the commands show: our warnings, once, and a line per new thing where there is no terminal."""

from __future__ import annotations

import types
import warnings

import pytest

from asyncdiff.cli.console import print_table, progress, quiet_libraries


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(warnings, "filters", list(warnings.filters))
    quiet_libraries()


def warn_from(module: str, message: str, stacklevel: int) -> None:
    """`warnings.warn` as if `module` had called it."""
    code = "def warn(message, stacklevel):\n    warnings.warn(message, stacklevel=stacklevel)\n"
    namespace = vars(types.ModuleType(module))
    namespace["warnings"] = warnings
    exec(code, namespace)
    namespace["warn"](message, stacklevel)


@pytest.mark.parametrize("stacklevel", [1, 2, 4])
def test_our_warning_is_one_line_wherever_it_points(
    stacklevel: int, quiet: None, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_from("asyncdiff.pipeline.x", "too\n short", stacklevel)
    assert capsys.readouterr().err == "Warning: too short\n"


def test_warnings_of_libraries_are_not_shown(quiet: None, capsys: pytest.CaptureFixture[str]) -> None:
    warn_from("diffusers.x", "deprecated", 1)
    assert capsys.readouterr().err == ""


def test_progress_without_a_terminal_is_one_line_per_new_thing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Starting") as report:
        for what, done in (("Loading", 0), ("Steps", 1), ("Steps", 2)):
            report(what, done, 2)
    assert capsys.readouterr().err == "Loading ...\nSteps ...\n"


def test_table_does_not_cut_long_values(capsys: pytest.CaptureFixture[str]) -> None:
    path = "folder/" * 15 + "out.png"
    print_table("t", [("written", "", path), ("speed-up [x]", "1.90", "")])
    printed = capsys.readouterr().out
    assert path in printed
    assert "speed-up [x]" in printed

"""The measuring commands refuse bad input before anything starts, and answer `--help` without torch."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from asyncdiff.bench import command

NAMES = ("exchange", "many_runs", "start_up", "traffic", "unequal")


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    module = importlib.import_module(f"asyncdiff.bench.{name}")
    with pytest.raises(SystemExit) as ending:
        command.run_command(getattr(module, name))
    assert isinstance(ending.value.code, int)
    return ending.value.code


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("exchange", ["--kind", "ring"], "--kind ring: must be one of chain, nested"),
        ("exchange", ["--devices", "cpu"], "two devices exchange, but 1 were given"),
        ("exchange", ["--kib", "0"], "--kib 0: must be 1 or more"),
        ("many_runs", ["--images", "3"], "needs two or more different numbers"),
        ("many_runs", ["--vary", "weather"], "--vary weather: must be one of"),
        ("many_runs", ["--pipeline", "unheard-of"], "no tiny pipeline 'unheard-of'"),
        ("start_up", ["--way", "by-hand"], "--way by-hand: must be one of"),
        ("start_up", ["--arch", "unheard-of"], "--arch unheard-of is not known"),
        ("start_up", ["--dtype", "int8"], "--dtype int8: must be"),
        ("traffic", ["--stages", "1"], "--stages 1: must be 2 or more"),
        ("traffic", ["--arch", "unheard-of"], "--arch unheard-of is not known"),
        ("unequal", ["--speed", "1.5"], "--speed 1.5: must be above 0, and 1 at most"),
        ("unequal", ["--steps", "0"], "--steps 0: must be 1 or more"),
        ("unequal", ["--dtype", "int8"], "--dtype int8: must be float32, bfloat16 or float16"),
        ("traffic", ["--json", "/no/such/folder/figures.json"], "does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    name: str,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(name, arguments, monkeypatch) == 2
    captured = capsys.readouterr()
    assert said in " ".join(captured.err.replace("│", " ").split())
    assert not captured.out


def test_help_does_not_import_torch() -> None:
    commands = "; ".join(
        [
            "import sys",
            "from asyncdiff.bench import command, " + ", ".join(NAMES),
            "assert 'torch' not in sys.modules",
        ]
    )
    subprocess.run([sys.executable, "-c", commands], check=True, timeout=60)


def test_figures_go_with_machine_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.setattr(sys, "argv", ["traffic.py", "--arch", "demo"])
    command.finish("traffic", {"results": [1]}, tmp_path / "figures.json")
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["results"] == [1]
    assert written["command"] == "python -m asyncdiff.bench.traffic --arch demo"
    assert written["environment"]["devices"][0]["name"] == "cpu"

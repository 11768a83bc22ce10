"""Spawned workers from scripts as people write them, and what becomes of the workers when the script ends."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from processes import run_script, wait_until_gone

SCRIPTS = Path(__file__).parent / "scripts"


def test_next_picture_is_right_after_ctrl_c_at_any_moment(tmp_path: Path) -> None:
    ended = run_script([str(SCRIPTS / "interrupts.py"), str(tmp_path)])
    assert "every picture was right" in ended.stdout, ended.stderr
    assert ended.returncode in (-signal.SIGINT, 130), ended.stderr
    assert ended.stderr.count("Traceback (most recent call last)") == 1, ended.stderr
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt")
    wait_until_gone([int(ended.stdout.split()[0])])


def test_workers_end_when_the_driver_is_killed(tmp_path: Path) -> None:
    ended = run_script([str(SCRIPTS / "killed_driver.py"), str(tmp_path)])
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    wait_until_gone([int(pid) for pid in ended.stdout.split()])
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_unguarded_script_and_its_threads(source: str) -> None:
    script = SCRIPTS / "unguarded.py"
    ended = run_script([str(script)]) if source == "file" else run_script(["-"], stdin=script.read_text())
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[:2] == ["equal", "equal"]
    assert lines[2].startswith("MyConv is defined in the running script (__main__)")
    assert len(lines) == 3, "something was printed twice"
    assert "Traceback" not in ended.stderr

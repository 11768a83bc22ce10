"""`asyncdiff generate` on the bundled model, two CPU processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import asyncdiff

_ASSETS = Path(asyncdiff.__file__).parent / "demo" / "assets"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(asyncdiff, "parallelize") or not any(_ASSETS.rglob("*.safetensors")),
        reason="needs asyncdiff.parallelize and the bundled model",
    ),
]
GENERATE = [sys.executable, "-m", "asyncdiff", "generate", "--prompt", "a red circle", "--devices", "cpu,cpu"]


def generate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*GENERATE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=folder)


def test_generates_compares_and_traces(tmp_path: Path) -> None:
    done = generate(
        tmp_path, "--steps", "6", "--seed", "1", "--compare", "--trace", "run.json", "-o", "out.png"
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out.png").size == (64, 64)
    assert Image.open(tmp_path / "out-compare.png").width > 3 * 64
    assert json.loads((tmp_path / "run.json").read_text())
    assert "PSNR" in done.stdout
    assert "speed-up" in done.stdout
    assert "Traceback" not in done.stderr


def test_several_pictures_are_numbered_and_each_has_its_own_seed(tmp_path: Path) -> None:
    done = generate(tmp_path, "--steps", "5", "--seed", "1", "-n", "2", "-o", "two.png")
    assert done.returncode == 0, done.stderr
    done = generate(tmp_path, "--steps", "5", "--seed", "2", "-o", "second.png")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["second.png", "two-1.png", "two-2.png"]
    assert (tmp_path / "two-2.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def test_missing_model_is_one_line(tmp_path: Path) -> None:
    done = generate(tmp_path, "--model", "nobody/nothing", "-o", "out.png")
    assert done.returncode == 1
    error = [line for line in done.stderr.splitlines() if not line.endswith(" ...")]
    assert len(error) == 1, done.stderr
    assert error[0].startswith("Error: Cannot load --model nobody/nothing")


def test_interrupt_ends_everything_with_one_line(tmp_path: Path) -> None:
    command = [*GENERATE, "--steps", "1000", "-o", "out.png"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stderr is not None
    for line in process.stderr:  # the last thing it says before it generates
        if line.startswith("On cpu, cpu"):
            break
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error == "Interrupted.\n"
    assert not (tmp_path / "out.png").exists()

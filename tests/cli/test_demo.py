"""`asyncdiff demo` writes its picture, trace and figures."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("asyncdiff.bench.demo") is None, reason="needs asyncdiff.bench.demo"
    ),
]


def test_demo_writes_picture_trace_and_figures(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "asyncdiff",
        "demo",
        "--devices",
        "cpu,cpu",
        "--steps",
        "6",
        "--json",
        "demo.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert {"speedup", "psnr_db", "seconds_in_order", "seconds", "environment"} <= set(figures)
    assert figures["devices"] == ["cpu", "cpu"]
    assert Image.open(tmp_path / "asyncdiff-demo.png").width > 3 * 64
    assert json.loads((tmp_path / "asyncdiff-demo-trace.json").read_text())
    assert "speed-up" in done.stdout.lower()
    assert "Traceback" not in done.stderr

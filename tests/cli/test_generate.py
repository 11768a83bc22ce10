"""`asyncdiff generate` on the bundled model, two CPU processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
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


def generate(folder: Path, arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*GENERATE, *arguments.split()]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=folder)


def in_order(seed: int, steps: int) -> Image.Image:
    """What the untouched pipeline makes in this process."""
    import torch

    from asyncdiff.demo import GUIDANCE_SCALE, load_demo_pipeline

    pipe = load_demo_pipeline()
    generator = torch.Generator("cpu").manual_seed(seed)
    output = pipe(
        "a red circle", num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE, generator=generator
    )
    return output.images[0]


def test_generates_compares_and_traces(tmp_path: Path) -> None:
    # With as many warm-up steps as steps, two processes make bitwise what one makes (tests: one thread each).
    done = generate(
        tmp_path,
        "--steps 5 --warmup-steps 5 --seed 1 -n 2 --compare --trace run.json --guidance together -o out.png",
    )
    assert done.returncode == 0, done.stderr
    written = ["out-1.png", "out-2.png", "out-compare.png", "run.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    assert all(name in done.stdout for name in written)
    assert Image.open(tmp_path / "out-1.png").tobytes() == in_order(1, 5).tobytes()
    assert Image.open(tmp_path / "out-2.png").tobytes() == in_order(2, 5).tobytes()
    assert Image.open(tmp_path / "out-compare.png").width > 3 * 64
    assert json.loads((tmp_path / "run.json").read_text())
    assert "identical" in done.stdout
    assert "speed-up" in done.stdout
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Warning: ") == 1, done.stderr  # a run too short to gain says so, once


def test_guidance_is_split_by_default(tmp_path: Path) -> None:
    """Which differs from one device in last bits only, and has no warm-up to be too short for."""
    done = generate(tmp_path, "--steps 5 --seed 1 --compare -o out.png")
    assert done.returncode == 0, done.stderr
    assert "groups for guidance: 2, stages: 1 each" in " ".join(done.stdout.split())
    made, expected = (np.asarray(each, int) for each in (Image.open(tmp_path / "out.png"), in_order(1, 5)))
    assert np.abs(made - expected).max() <= 1
    assert "Warning" not in done.stderr


def test_a_tolerance_that_nothing_keeps_runs_in_order(tmp_path: Path) -> None:
    done = generate(
        tmp_path, "--steps 4 --warmup-steps auto --tolerance 1e-9 --guidance together --compare -o out.png"
    )
    assert done.returncode == 0, done.stderr
    assert "identical" in done.stdout


def test_missing_model_is_one_line(tmp_path: Path) -> None:
    done = generate(tmp_path, "--model nobody/nothing -o out.png")
    assert done.returncode == 1
    error = [line for line in done.stderr.splitlines() if not line.endswith(" ...")]
    assert len(error) == 1, done.stderr
    assert error[0].startswith("Error: Cannot load --model nobody/nothing")


def test_interrupt_ends_everything_with_one_line(tmp_path: Path) -> None:
    command = [*GENERATE, "--steps", "900", "-o", "out.png"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, preexec_fn=_heed_interrupts
    )
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


def _heed_interrupts() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

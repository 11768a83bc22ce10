"""`asyncdiff generate --preview-devices`: the pictures of several devices, made on one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from asyncdiff.cli.app import build_app
from asyncdiff.cli.failures import run

GENERATE = ["generate", "--prompt", "a red circle", "-o", "out.png"]

BAD: list[tuple[str, str]] = [
    ("--preview-devices 1", "--preview-devices 1: must be 2 or more"),
    ("--preview-devices two", "--preview-devices"),
    ("--preview-devices 3 --devices cpu,cpu", "--devices cpu,cpu and --preview-devices 3"),
    ("--preview-devices 3 --devices 3", "--devices 3 and --preview-devices 3"),
    ("--preview-devices 2 --stages 3", "--stages 3 with --stride 1 needs 3 devices"),
    ("--preview-devices 2 --stride 3", "--stride 3 needs at least 3 devices"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_usage_is_one_line_and_code_2(
    arguments: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ASYNCDIFF_DEBUG", raising=False)
    code = run(build_app(), [*GENERATE, *arguments.split()])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.count("\n") == 1, error
    assert expected in error
    assert not list(tmp_path.iterdir())


def generate(folder: Path, arguments: str) -> str:
    command = [sys.executable, "-m", "asyncdiff", *GENERATE, "--seed", "1", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def parallel_picture(steps: int, **settings: int) -> Image.Image:
    """What the library makes with all stages in this process."""
    import torch

    import asyncdiff
    from asyncdiff.demo import GUIDANCE_SCALE, load_demo_pipeline

    pipe = load_demo_pipeline()
    with asyncdiff.parallelize(pipe, **settings):
        picture: Image.Image = pipe(
            "a red circle",
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator().manual_seed(1),
        ).images[0]
    return picture


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")
def test_preview_is_the_picture_of_so_many_devices(tmp_path: Path) -> None:
    shown = generate(tmp_path, "--steps 6 --preview-devices 3 --stride 2 --compare")
    assert Image.open(tmp_path / "out.png").tobytes() == parallel_picture(6, num_stages=2, stride=2).tobytes()
    assert "3 devices" in shown
    assert "stages: 2" in shown
    assert "PSNR" in shown
    # The times of one device that does the work of three say nothing about three.
    assert "seconds" not in shown
    assert "speed-up" not in shown
    assert (tmp_path / "out-compare.png").exists()


@pytest.mark.wide
def test_preview_in_order_is_the_picture_of_one_device(tmp_path: Path) -> None:
    assert "identical" in generate(tmp_path, "--steps 4 --warmup-steps 4 --preview-devices 4 --compare")

"""`asyncdiff quality`: what it refuses before anything starts, and one run to the end."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from asyncdiff.cli.app import build_app
from asyncdiff.cli.failures import run

# (arguments, what the one line must contain)
BAD: list[tuple[str, str]] = [
    ("--configs 2", "--configs 2: '2' is no configuration"),
    ("--configs 2x1,1x1", "1x1 takes 1 devices"),
    ("--devices 2 --configs 3x1", "3x1 takes 3 devices"),
    ("--devices 1", "--devices 1: must be 2 or more"),
    ("--devices cpu,gpu", "'gpu' is no device"),
    ("--forecast none,cubic", "'cubic' is none of"),
    ("--freshness new", "'new' is none of"),
    ("--warmup-steps 0", "--warmup-steps 0"),
    ("--steps 1", "--steps 1: must be 2 or more"),
    ("--batch-size 0", "--batch-size 0"),
    ("--num-captions 0", "--num-captions 0"),
    ("--num-captions 20000", "--num-captions 20000"),
    ("--seed -1", "--seed -1"),
    ("--guidance-scale -1", "--guidance-scale -1"),
    ("--dtype int8", "bfloat16"),
    ("--model ./nowhere", "no such folder"),
    ("--model owner/name", "give --captions FILE"),
    ("--captions missing.txt", "--captions missing.txt: cannot be read"),
    ("--captions empty.txt", "--captions empty.txt: has no captions"),
    ("--captions two.txt --num-captions 3", "--num-captions 3: two.txt has 2"),
    ("--json quality.csv", ".json"),
    ("--csv quality.json", ".csv"),
    ("--html missing/quality.html", "folder missing does not exist"),
    ("--picture quality.gif", ".png"),
    ("--picture folder.png", "is a folder"),
    ("--lpips-weights alex.pth", "--lpips-weights alex.pth: is no file"),
    ("--clip-score-weights pictures", "--clip-score-weights pictures: must be a folder with config.json"),
    ("--fid-images pictures", "--fid-weights and --fid-images belong together"),
    ("--fid-weights two.txt --fid-images pictures", "has 1 pictures, but FID needs 1000 or more"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "two.txt").write_text("a red circle\n\na blue square\n")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ASYNCDIFF_DEBUG", raising=False)
    return tmp_path


@pytest.mark.parametrize(("arguments", "expected"), BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_usage_is_one_line_and_code_2(
    arguments: str, expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    code = run(build_app(), ["quality", *arguments.split()])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("Error: ")
    assert expected in captured.err
    assert sorted(folder.rglob("*")) == before


def test_folder_without_permission_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    assert run(build_app(), ["quality", "--json", "quality.json"]) == 2
    assert "--json quality.json: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["torchmetrics", "matplotlib"])
def test_missing_package_names_the_extra(
    package: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert run(build_app(), ["quality", "--html", "quality.html"]) == 2
    assert "pip install 'asyncdiff[bench]'" in capsys.readouterr().err


def test_bad_usage_loads_no_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom asyncdiff.cli import main\n"
        "try: main(['quality', '--fid-images', 'pictures'])\n"
        "except SystemExit as end: assert end.code == 2, end.code\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_unknown_noise_scheduler_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(build_app(), ["quality", "--scheduler", "DDIM", "--num-captions", "1"])
    assert code == 2
    assert "--scheduler DDIM: is no noise scheduler of diffusers" in capsys.readouterr().err


@pytest.mark.slow
def test_writes_every_file_and_prints_what_is_in_them(folder: Path) -> None:
    command = [
        sys.executable, "-m", "asyncdiff", "quality", "--captions", "two.txt", "--steps", "5",
        "--configs", "2x1", "--warmup-steps", "1,5",
        "--forecast", "linear", "--json", "q.json", "--csv", "q.csv",
        "--html", "q.html", "--picture", "q.png",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads((folder / "q.json").read_text())
    assert result["generation"]["captions"] == ["a red circle", "a blue square"]
    assert [way["way"]["freshness"] for way in result["ways"]] == ["paper", "auto"] * 2
    rows = list(csv.DictReader((folder / "q.csv").open()))[1:]
    for way, row in zip(result["ways"], rows, strict=True):
        psnr = way["summary"]["psnr_mean_db"]
        assert row["psnr_mean_db"] == ("inf" if psnr is None else str(psnr))
        shown = "identical" if psnr is None else f"{psnr:.1f} dB"
        assert shown in done.stdout
        assert (psnr is None) == (way["way"]["warmup_steps"] == 5)
    assert "MS-SSIM (3 of 5 scales)" in done.stdout
    assert "data:image/png;base64," in (folder / "q.html").read_text()
    assert Image.open(folder / "q.png").width > 4 * 192
    for name in ("q.json", "q.csv", "q.html", "q.png"):
        assert name in done.stdout

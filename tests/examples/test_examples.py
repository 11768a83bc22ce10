"""Every example as a user starts it, on its stand-in; most of them in this process, which is quicker."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import imageio
import numpy
import pytest
from diffusers import ControlNetModel, MotionAdapter
from PIL import Image, ImageSequence
from processes import run_script

import asyncdiff
from asyncdiff.tiny import tiny_pipeline

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("run_*.py"))
VIDEOS = ("run_animatediff", "run_svd")
WIDE_BUT_ONE = [  # all others when there is time
    name if name == "run_sd15" else pytest.param(name, marks=pytest.mark.wide) for name in NAMES
]
TINY = ("--tiny", "--steps", "5")
NUM_FRAMES = 4
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_there_is_one_for_every_pipeline_of_the_list() -> None:
    assert NAMES == [
        "run_animatediff",
        "run_controlnet_sd15",
        "run_controlnet_sdxl",
        "run_sd15",
        "run_sd21",
        "run_sd3",
        "run_sdxl",
        "run_sdxl_inpainting",
        "run_svd",
        "run_x4_upscaler",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_readme_lists_it(name: str) -> None:
    row = next(
        line for line in (ROOT / "README.md").read_text().splitlines() if f"examples/{name}.py" in line
    )
    model = next(line for line in source(name).splitlines() if line.strip().startswith("model=")).split('"')[
        1
    ]
    assert model in row


@pytest.mark.parametrize("name", NAMES)
def test_one_line_is_added(name: str) -> None:
    """And the rest is what a script without asyncdiff has."""
    assert source(name).count("asyncdiff.parallelize(pipe, **options.parallel)  # the one added line") == 1


@pytest.mark.parametrize("name", NAMES)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, name, "--help")
    assert ended.value.code in (0, None)
    shown = capsys.readouterr().out
    for option in (
        "--tiny", "--devices", "--stages", "--stride", "--warmup-steps", "--time-shift", "--seed", "--output",
    ):  # fmt: skip
        assert option in shown


@pytest.mark.parametrize("name", NAMES)
def test_on_one_device(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = output_of(name, tmp_path)
    run_here(monkeypatch, name, *TINY, *more(name), "--devices", "cpu", "--output", str(output))
    check_files(name, output)
    assert capsys.readouterr().out.startswith(f"Wrote {output}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", WIDE_BUT_ONE)
def test_python_and_torchrun_make_the_same(name: str, tmp_path: Path) -> None:
    spawned, joined = output_of(name, tmp_path / "python"), output_of(name, tmp_path / "torchrun")
    call = [str(EXAMPLES / f"{name}.py"), *TINY, *more(name), "--stages", "2", "--output"]
    check_run(run_script([*call, str(spawned), "--devices", "cpu,cpu"]), spawned)
    check_run(run_script([*TORCHRUN, *call, str(joined)]), joined)
    check_files(name, spawned)
    check_files(name, joined)
    for path in spawned.parent.iterdir():
        assert path.read_bytes() == (joined.parent / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", WIDE_BUT_ONE)
def test_checkpoint_gives_what_the_stand_in_gives(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The lines that load a published checkpoint, on a folder in its place."""
    stand_in = tiny_pipeline(name.removeprefix("run_").replace("_", "-"))
    if name == "run_animatediff":
        stand_in.motion_adapter.save_pretrained(tmp_path / "motion_adapter")
        stand_in = tiny_pipeline("sd15")
    stand_in.save_pretrained(tmp_path, variant="fp16" if 'variant="fp16"' in source(name) else None)
    if "controlnet" in name:
        stand_in.controlnet.save_pretrained(tmp_path / "controlnet")
    for kind in (ControlNetModel, MotionAdapter):
        load_from(monkeypatch, kind, tmp_path)
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(tmp_path / "picture.png")
    picture = ("--image", str(tmp_path / "picture.png")) if "takes_image" in source(name) else ()
    mask = ("--mask", str(tmp_path / "picture.png")) if "takes_mask" in source(name) else ()
    pictures = []
    for model in (("--tiny",), ("--model", str(tmp_path))):
        output = output_of(name, tmp_path / model[0].strip("-"))
        call = (
            *model,
            "--steps",
            "3",
            "--height",
            "64",
            "--width",
            "64",
            "--devices",
            "cpu",
            *picture,
            *mask,
        )
        frames = ("--num-frames", str(NUM_FRAMES)) if name in VIDEOS else ()
        run_here(monkeypatch, name, *call, *frames, "--output", str(output))
        pictures.append(output.read_bytes())
    assert pictures[0] == pictures[1]


def test_settings_reach_parallelize(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = {}
    monkeypatch.setattr(asyncdiff, "parallelize", lambda pipe, **settings: given.update(settings))
    settings = ("--stages", "2", "--stride", "2", "--warmup-steps", "3", "--time-shift")
    output = tmp_path / "picture.png"
    run_here(monkeypatch, "run_sd15", *TINY, *settings, "--devices", "cpu,cpu,cpu", "--output", str(output))
    assert given == {
        "devices": ["cpu", "cpu", "cpu"],
        "num_stages": 2,
        "stride": 2,
        "warmup_steps": 3,
        "time_shift": True,
    }


def test_seed_and_prompt_and_size_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changes = ((), ("--seed", "1"), ("--prompt", "a red heart"), ("--height", "72", "--width", "80"))
    pictures = []
    for i, change in enumerate(changes):
        output = tmp_path / f"{i}.png"
        run_here(monkeypatch, "run_sd15", *TINY, "--devices", "cpu", "--output", str(output), *change)
        pictures.append(Image.open(output))
    assert len({picture.tobytes() for picture in pictures}) == len(changes)
    assert pictures[-1].size == (80, 72)


def test_picture_and_mask_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Image.new("RGB", (96, 64), "red").save(tmp_path / "red.png")
    Image.new("L", (96, 64)).save(tmp_path / "nothing.png")
    given = (
        "--image",
        str(tmp_path / "red.png"),
        "--mask",
        str(tmp_path / "nothing.png"),
        "--height",
        "64",
        "--width",
        "128",
    )
    output = tmp_path / "out.png"
    run_here(monkeypatch, "run_sdxl_inpainting", *TINY, *given, "--devices", "cpu", "--output", str(output))
    with Image.open(output) as picture:
        assert picture.size == (128, 64)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("run_sd15", ("--steps", "0"), "--steps 0: must be 1 or more."),
        ("run_sd15", ("--steps", "many"), "argument --steps: invalid int value: 'many'"),
        ("run_sd15", ("--speed", "9"), "unrecognized arguments: --speed 9"),
        ("run_sd15", ("--height", "63"), "--height 63: must be a positive multiple of 8."),
        ("run_sd15", ("--height", "64"), "--height and --width go together: give both or neither."),
        ("run_sd3", ("--width", "24"), "--width 24: must be a positive multiple of 16."),
        ("run_sd15", ("--devices", "cpu,gpu"), "--devices cpu,gpu: 'gpu' is no device."),
        ("run_sd15", ("--devices", "cpu,cpu", "--stages", "3"), "--stages 3 with --stride 1 needs 3 devices"),
        ("run_sd15", ("--devices", "cpu,cuda:77"), "'cuda:77' was given, but this machine has"),
        ("run_sd15", ("--output", "nowhere/x.png"), "--output nowhere/x.png: the folder nowhere does not"),
        ("run_sd15", ("--output", "x.mp4"), "--output x.mp4: the file must end in .png or"),
        ("run_svd", ("--output", "x.png"), "--output x.png: the file must end in .mp4 or .gif."),
        ("run_svd", ("--image", "missing.png"), "--image missing.png: no such file."),
        ("run_sdxl_inpainting", ("--mask", "m.png"), "--image and --mask go together"),
        ("run_sd15", ("--model", "./missing"), "--model ./missing: no such folder"),
    ],
)
def test_bad_usage(
    name: str,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = () if "--model" in arguments else TINY
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, name, *tiny, *arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Error: {message}")


def test_model_that_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, "run_sd15", "--devices", "cpu", "--model", "nobody/has-this")
    assert ended.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("Error: ")
    assert last.endswith("(--tiny needs no download)")


def test_torchrun_with_too_few_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, "run_sd15", *TINY, "--stages", "3")
    assert ended.value.code == 2
    assert "--stages 3 with --stride 1 needs 3 devices" in capsys.readouterr().err


def source(name: str) -> str:
    return (EXAMPLES / f"{name}.py").read_text()


def more(name: str) -> tuple[str, ...]:
    """What keeps the larger ones short."""
    if name in VIDEOS:
        return "--num-frames", str(NUM_FRAMES)
    return ("--height", "16", "--width", "16") if name == "run_x4_upscaler" else ()


def output_of(name: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder / ("out.mp4" if name in VIDEOS else "out.png")


def run_here(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    """The script as `__main__` of this process."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def load_from(monkeypatch: pytest.MonkeyPatch, kind: Any, folder: Path) -> None:
    """Whatever id is asked for."""
    load = kind.from_pretrained
    subfolder = "controlnet" if kind is ControlNetModel else "motion_adapter"
    monkeypatch.setattr(kind, "from_pretrained", lambda model, **how: load(folder / subfolder, **how))


def check_run(ended: Any, output: Path) -> None:
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Wrote") == 1, ended.stdout
    assert f"Wrote {output}" in ended.stdout
    assert "Traceback" not in ended.stderr, ended.stderr


def check_files(name: str, output: Path) -> None:
    """A picture of 64 pixels that is not of one colour; of a video, an mp4 and a gif with all frames."""
    if name not in VIDEOS:
        with Image.open(output) as picture:
            assert picture.size == (64, 64)
            assert numpy.asarray(picture).std() > 1
        return
    frames = imageio.mimread(output)
    assert len(frames) == NUM_FRAMES
    assert frames[0].shape == (64, 64, 3)
    with Image.open(output.with_suffix(".gif")) as gif:
        pixels = [numpy.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
    assert len(pixels) == NUM_FRAMES
    assert all(frame.std() > 1 for frame in pixels)
    assert not numpy.array_equal(pixels[0], pixels[-1])

"""What the examples share and what no script of yours needs: options, starting pictures, files, failures."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from diffusers.utils import export_to_gif, export_to_video, load_image
from PIL import Image, ImageFilter

from asyncdiff.bench.loading import first_sentence
from asyncdiff.cli import arguments
from asyncdiff.cli.console import quiet_libraries
from asyncdiff.cli.devices import resolve_devices
from asyncdiff.cli.failures import BAD_USAGE, FAILED
from asyncdiff.demo.captions import DEMO_CAPTIONS, scene_of
from asyncdiff.demo.drawing import draw
from asyncdiff.errors import AsyncDiffError, ConfigurationError
from asyncdiff.pipeline.devices import settle_placement

RANK = int(os.environ.get("RANK", "0"))
VIDEO_SUFFIXES = (".mp4", ".gif")

# Says at the import of a pipeline that torchvision is missing, which nothing here needs.
transformers.logging.set_verbosity_error()


@dataclass(frozen=True)
class Defaults:
    """Of the options of that name. `prompt`, `num_frames`: None where the pipeline takes none. `size`: width
    and height, where the pipeline does not know its own.
    """

    model: str
    output: str
    steps: int
    prompt: str | None = None
    num_frames: int | None = None
    size: tuple[int, int] | None = None
    size_divisor: int = 8
    takes_image: bool = False
    takes_mask: bool = False


@dataclass(frozen=True)
class Options:
    """The command line. `parallel`: the arguments of `asyncdiff.parallelize`. `device`: where this process
    puts the pipeline.
    """

    model: str
    tiny: bool
    prompt: str | None
    image: str | None
    mask: str | None
    steps: int
    height: int | None
    width: int | None
    num_frames: int | None
    seed: int
    output: Path
    device: str
    dtype: torch.dtype
    parallel: dict[str, Any]

    def generator(self) -> torch.Generator:
        """Random numbers from the CPU: the same on every kind of device."""
        return torch.Generator("cpu").manual_seed(self.seed)

    def load_picture(self, published: str) -> Image.Image:
        """The picture to start from: --image, else the `published` one, with --tiny one drawn here."""
        drawn = self.tiny and self.image is None
        return self._resized(
            draw(scene_of(DEMO_CAPTIONS[0])) if drawn else load_image(self.image or published)
        )

    def load_mask(self, published: str) -> Image.Image:
        """White where it is painted anew: --mask, else the `published` one, with --tiny the middle."""
        if not self.tiny or self.mask is not None:
            return self._resized(load_image(self.mask or published))
        middle = Image.new("RGB", (64, 64))
        middle.paste("white", (16, 16, 48, 48))
        return self._resized(middle)

    def _resized(self, picture: Image.Image) -> Image.Image:
        return picture.resize((self.width or picture.width, self.height or picture.height))


def run(main: Callable[[Options], None], description: str | None, defaults: Defaults) -> None:
    """Call `main` with the options; every failure is one line, bad usage ends with code 2."""
    given = _parser(description, defaults).parse_args()
    try:
        options = _options(given, defaults)
        if options.tiny:
            quiet_libraries()
        main(options)
    except ConfigurationError as error:
        _fail(str(error), BAD_USAGE)
    except AsyncDiffError as error:
        _fail(str(error), FAILED)
    except OSError as error:
        hint = "" if given.tiny else " (--tiny needs no download)"
        _fail(f"{first_sentence(error)}{hint}", FAILED)
    print(f"Wrote {' and '.join(map(str, _written(options.output)))}")


def write_video(frames: list[Image.Image], output: Path, fps: int) -> None:
    """`output` and, beside it, the same frames in the other format: one .mp4 and one .gif."""
    mp4, gif = _written(output)
    export_to_video(frames, str(mp4), fps=fps)
    export_to_gif(frames, str(gif), fps=fps)


def edges(picture: Image.Image) -> Image.Image:
    """White outlines on black: what a ControlNet for Canny edges is given."""
    outlines = picture.convert("L").filter(ImageFilter.FIND_EDGES)
    return outlines.point(lambda value: 255 if value > 60 else 0).convert("RGB")


class _Parser(argparse.ArgumentParser):
    """One line for what is wrong, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        _fail(message, BAD_USAGE)


def _parser(description: str | None, defaults: Defaults) -> _Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=description, formatter_class=raw, allow_abbrev=False)
    parser.set_defaults(prompt=None, image=None, mask=None, num_frames=None)

    def add(name: str, default: Any = None, text: str = "", **how: Any) -> None:
        parts = [text] if text else []
        if default is not None:
            parts.append(f"default: {default}")
        parser.add_argument(name, default=default, help="; ".join(parts), **how)

    add("--model", defaults.model, metavar="ID|FOLDER")
    parser.add_argument(
        "--tiny", action="store_true", help="a stand-in with random weights: draws noise, offline"
    )
    if defaults.prompt is not None:
        add("--prompt", defaults.prompt)
    if defaults.takes_image:
        add("--image", text="default: the one that the checkpoint is shown with", metavar="FILE|URL")
    if defaults.takes_mask:
        add("--mask", text="white where it is painted anew; goes with --image", metavar="FILE|URL")
    add("--steps", defaults.steps, "denoising steps", type=int, metavar="N")
    if defaults.num_frames is not None:
        add("--num-frames", defaults.num_frames, type=int, metavar="N")
    for name in ("--height", "--width"):
        add(name, text=f"a multiple of {defaults.size_divisor}", type=int, metavar="PIXELS")
    add("--seed", 0, type=int, metavar="N")
    files = "one .mp4 and one .gif are written" if defaults.num_frames else "a picture"
    add("--output", Path(defaults.output), files, type=Path, metavar="FILE")
    places = "cuda:0,cuda:1 or cpu,cpu or a number (default: one per stage; under torchrun one per process)"
    add("--devices", text=places, metavar="N|LIST")
    add(
        "--stages",
        text="parts of the denoiser (default: what the devices allow, else 2)",
        type=int,
        metavar="N",
    )
    add("--stride", 1, "steps that share one exchange", type=int, metavar="S")
    add("--warmup-steps", 1, "steps that run in order first", type=int, metavar="W")
    parser.add_argument("--time-shift", action="store_true", help="condition on the previous timestep")
    return parser


def _options(given: argparse.Namespace, defaults: Defaults) -> Options:
    """The options, everything checked that can be before a model is loaded."""
    split = arguments.check_split(
        given.devices,
        given.stages,
        given.stride,
        str(given.warmup_steps),
        tolerance=None,
        time_shift=given.time_shift,
        forecast="linear",
        freshness="auto",
    )
    for option, value in (("--height", given.height), ("--width", given.width)):
        if value is not None and (value <= 0 or value % defaults.size_divisor):
            raise ConfigurationError(
                f"{option} {value}: must be a positive multiple of {defaults.size_divisor}."
            )
    # Stable Diffusion's pipelines would silently take their default for both.
    _check_together("--height", given.height, "--width", given.width)
    arguments.check_at_least("--steps", given.steps, 1)
    arguments.check_at_least("--num-frames", given.num_frames, 2)
    arguments.check_seed(given.seed)
    is_video = given.num_frames is not None
    for path in _written(given.output) if is_video else (given.output,):
        arguments.check_writable("--output", path, VIDEO_SUFFIXES if is_video else arguments.IMAGE_SUFFIXES)
    if is_video and not importlib.util.find_spec("imageio_ffmpeg"):
        raise ConfigurationError(
            "An .mp4 needs imageio and imageio-ffmpeg: pip install 'asyncdiff[examples]'."
        )
    if defaults.takes_mask:
        _check_together("--image", given.image, "--mask", given.mask)
    for option, source in (("--image", given.image), ("--mask", given.mask)):
        if source is not None and "://" not in source and not Path(source).is_file():
            raise ConfigurationError(f"{option} {source}: no such file.")
    if not given.tiny:
        arguments.check_model(given.model)
    width, height = defaults.size if defaults.size and not given.tiny else (None, None)
    devices = _devices(split)
    return Options(
        model=given.model,
        tiny=given.tiny,
        prompt=given.prompt,
        image=given.image,
        mask=given.mask,
        steps=given.steps,
        height=given.height or height,
        width=given.width or width,
        num_frames=given.num_frames,
        seed=given.seed,
        output=given.output,
        # A process that torchrun started besides the first only lends its device to a stage.
        device=devices[0] if RANK == 0 else "cpu",
        dtype=torch.float32 if devices[0] == "cpu" else torch.float16,
        parallel={
            "devices": devices,
            "num_stages": split.num_stages,
            "stride": split.stride,
            "warmup_steps": split.warmup_steps,
            "time_shift": split.time_shift,
        },
    )


def _check_together(option: str, value: object, other: str, other_value: object) -> None:
    if (value is None) != (other_value is None):
        raise ConfigurationError(f"{option} and {other} go together: give both or neither.")


def _devices(split: arguments.Split) -> list[str]:
    """A device for every stage; refused here already where stages, stride and devices do not fit."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if isinstance(split.devices, tuple):
        devices = list(split.devices)
    elif num_processes > 1:
        devices = ["cuda" if torch.cuda.is_available() else "cpu"] * (split.devices or num_processes)
    else:
        devices = resolve_devices(split.devices or (split.num_stages or 2) + split.stride - 1)
    arguments.stages_for(len(devices), split.num_stages, split.stride)
    settle_placement(devices, split.num_stages, split.stride, "auto", torch.device(devices[0]))
    return devices


def _written(output: Path) -> tuple[Path, ...]:
    """The files of a video; a picture is one file."""
    if output.suffix.lower() not in VIDEO_SUFFIXES:
        return (output,)
    return output.with_suffix(".mp4"), output.with_suffix(".gif")


def _fail(message: str, code: int) -> NoReturn:
    if RANK == 0 or code != BAD_USAGE:  # every process is given the same command line
        print(f"Error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)

"""The options that several commands share, and the checks that need nothing loaded.

Every check raises `ConfigurationError` naming the option, what was given and what is possible.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from asyncdiff.cli.failures import DEBUG_VARIABLE
from asyncdiff.config import AUTO, DEFAULT_TOLERANCE, Settings, settle, settle_groups, settle_warmup
from asyncdiff.errors import ConfigurationError

Forecast: TypeAlias = Literal["none", "linear", "damped", "latents"]
Freshness: TypeAlias = Literal["auto", "paper"]
Guidance: TypeAlias = Literal["auto", "split", "together"]
Dtype: TypeAlias = Literal["auto", "float32", "float16", "bfloat16"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_DEVICE_NAME = re.compile(r"(cpu|mps|cuda(:\d+)?|xpu(:\d+)?)")
_METHOD = "Asynchronous denoising"


def _remember_debug(asked: bool) -> bool:
    if asked:
        os.environ[DEBUG_VARIABLE] = "1"  # in the environment, so that worker processes see it too
    return asked


DebugOption = Annotated[
    bool,
    typer.Option("--debug", callback=_remember_debug, is_eager=True, help="Show tracebacks of failures."),
]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="N|LIST",
        help="A number (2), or names separated by commas (cpu,cpu or cuda:0,cuda:1). "
        "By default two CUDA devices where there are two, else cpu,cpu.",
    ),
]
StagesOption = Annotated[
    int | None,
    typer.Option(
        "--stages",
        metavar="N",
        rich_help_panel=_METHOD,
        help="Parts the denoiser is cut into. By default as many as the devices allow.",
    ),
]
StrideOption = Annotated[
    int,
    typer.Option(
        "--stride",
        metavar="S",
        rich_help_panel=_METHOD,
        help="Steps that share one exchange. Needs stages + stride - 1 devices.",
    ),
]
WarmupStepsOption = Annotated[
    int,
    typer.Option(
        "--warmup-steps",
        metavar="W",
        rich_help_panel=_METHOD,
        help="Steps run in order first: more is closer to the original, and slower.",
    ),
]
WarmupOption = Annotated[
    str,
    typer.Option(
        "--warmup-steps",
        metavar="W",
        rich_help_panel=_METHOD,
        help="Steps run in order first: more is closer to the original, and slower. 'auto': as many as "
        "--tolerance asks for, also later.",
    ),
]
ToleranceOption = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        metavar="E",
        rich_help_panel=_METHOD,
        help="With --warmup-steps auto: a step runs in order while the relative error of the forecast is "
        f"above this ({DEFAULT_TOLERANCE:g}).",
    ),
]
TimeShiftOption = Annotated[
    bool,
    typer.Option(
        "--time-shift",
        rich_help_panel=_METHOD,
        help="Condition on the previous timestep; for models that keep visible noise.",
    ),
]
ForecastOption = Annotated[
    Forecast,
    typer.Option(
        "--forecast",
        rich_help_panel=_METHOD,
        help="How stages make up for what reaches them a step late: 'latents' continues the latents, so that "
        "they work for the step to come, 'linear' continues the states, 'damped' as far as that has held so "
        "far, 'none' is the published method.",
    ),
]
FreshnessOption = Annotated[
    Freshness,
    typer.Option(
        "--freshness",
        rich_help_panel=_METHOD,
        help="'auto' reads what arrives in time at the step it was produced in, 'paper' one step late.",
    ),
]
GuidanceOption = Annotated[
    Guidance,
    typer.Option(
        "--guidance",
        rich_help_panel=_METHOD,
        help="'split' gives the halves of guidance to two groups of devices, which is exact, 'together' cuts "
        "for all devices; 'auto' splits where an even number of devices and the model allow.",
    ),
]
GuidanceRefreshOption = Annotated[
    int,
    typer.Option(
        "--guidance-refresh",
        metavar="K",
        rich_help_panel=_METHOD,
        help="Evaluate both halves of guidance at every K-th step only, and continue one in between.",
    ),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures to this JSON file.")
]


@dataclass(frozen=True)
class Split:
    """How the denoiser is divided, as asked on the command line; `devices` still unresolved."""

    devices: int | tuple[str, ...] | None
    num_stages: int | None
    stride: int
    warmup_steps: int | str
    tolerance: float | None
    time_shift: bool
    forecast: Forecast
    freshness: Freshness
    guidance: Guidance
    guidance_refresh: int


def check_split(
    devices: str | None,
    num_stages: int | None,
    stride: int,
    warmup_steps: str,
    tolerance: float | None,
    time_shift: bool,
    forecast: Forecast,
    freshness: Freshness,
    guidance: Guidance = "auto",
    guidance_refresh: int = 1,
) -> Split:
    """The options of the split, each checked as far as possible without knowing the machine."""
    check_at_least("--stages", num_stages, 1)
    check_at_least("--stride", stride, 1)
    warmup = check_warmup(warmup_steps, tolerance)
    check_at_least("--guidance-refresh", guidance_refresh, 1)
    asked = None if devices is None else parse_devices(devices)
    divided = num_stages or 1
    if asked is not None:
        divided = stages_for(asked if isinstance(asked, int) else len(asked), num_stages, stride, guidance)
    steps_in_order, least_tolerance = settle_warmup(warmup, tolerance)
    with _option_names():
        Settings(
            divided,
            stride,
            steps_in_order,
            time_shift,
            forecast,
            freshness,
            least_tolerance,
            groups=2 if guidance == "split" else 1,
            guidance_refresh=guidance_refresh,
        )
    return Split(
        asked,
        num_stages,
        stride,
        warmup,
        tolerance,
        time_shift,
        forecast,
        freshness,
        guidance,
        guidance_refresh,
    )


def check_warmup(text: str, tolerance: float | None) -> int | str:
    """`"3"` -> 3, `"auto"` as it is; with a tolerance only the latter."""
    if text != AUTO:
        if not text.lstrip("-").isdecimal():
            raise ConfigurationError(f"--warmup-steps must be a number or 'auto', not {text!r}.")
        if tolerance is not None:
            raise ConfigurationError(f"--tolerance goes with --warmup-steps auto, not with {text}.")
        check_at_least("--warmup-steps", int(text), 1)
        return int(text)
    if tolerance is not None and not tolerance > 0:
        raise ConfigurationError(f"--tolerance must be above 0, but {tolerance:g} was given.")
    return AUTO


def parse_devices(text: str) -> int | tuple[str, ...]:
    """`"2"` -> 2; `"cpu,cpu"` -> ("cpu", "cpu"). Whether they exist: `resolve_devices`."""
    if re.fullmatch(r"\d+", text.strip()):
        count = int(text)
        check_at_least("--devices", count, 1)
        return count
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if not _DEVICE_NAME.fullmatch(name):
            raise ConfigurationError(
                f"--devices {text}: {name!r} is no device. Give a number (2), "
                "or names separated by commas: cpu,cpu or cuda:0,cuda:1 (also mps, xpu:0)."
            )
    return names


def stages_for(num_devices: int, num_stages: int | None, stride: int, guidance: Guidance = "together") -> int:
    """The number of stages that keeps every device busy: `num_stages` if it does, else what fits if None.

    With `guidance="split"` those of each group; "auto", of which the first denoiser call decides, counts as
    "together".
    """
    with _option_names():
        groups = settle_groups(num_devices, num_stages, stride, guidance)
        return settle(num_devices // groups, num_stages, stride)[0]


@contextmanager
def _option_names() -> Iterator[None]:
    """The library's messages with the options' names in them: `num_stages=3` is `--stages 3` here."""
    try:
        yield
    except ConfigurationError as error:
        as_options = re.sub(
            r"\b(?:num_)?(stages|stride|warmup_steps|guidance_refresh)=(\d+)", r"--\1 \2", str(error)
        )
        as_options = re.sub(r'\b(guidance|forecast)="(\w+)"', r"--\1 \2", as_options)
        as_options = as_options.replace("time_shift=False", "no --time-shift")
        for name in ("warmup_steps", "guidance_refresh"):
            as_options = as_options.replace(f"--{name}", f"--{name.replace('_', '-')}")
        raise ConfigurationError(as_options) from error


def check_at_least(option: str, value: int | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise ConfigurationError(f"{option} {value}: must be {minimum} or more.")


def check_size(option: str, pixels: int | None) -> None:
    """Every autoencoder in use here divides height and width by 8 (or a multiple of it)."""
    if pixels is not None and (pixels < 8 or pixels % 8):
        below = max(8, pixels // 8 * 8)
        raise ConfigurationError(f"{option} {pixels}: must be a positive multiple of 8, such as {below}.")


def check_guidance_scale(value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise ConfigurationError(
            f"--guidance-scale {value}: must be a number of 0 or more (1 is no guidance)."
        )


def check_seed(value: int | None) -> None:
    if value is not None and not 0 <= value < 2**63:
        raise ConfigurationError(f"--seed {value}: must be between 0 and 2^63 - 1.")


def check_writable(option: str, path: Path | None, suffixes: tuple[str, ...]) -> None:
    """That `path` can be written when the work is done: its folder exists, and its ending is one we write."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise ConfigurationError(f"{option} {path}: the file must end in {' or '.join(suffixes)}.")
    if not path.parent.is_dir():
        raise ConfigurationError(f"{option} {path}: the folder {path.parent} does not exist. Make it first.")
    if path.is_dir():
        raise ConfigurationError(f"{option} {path}: is a folder, not a file.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigurationError(f"{option} {path}: cannot be written (no permission).")


def check_model(model: str) -> None:
    """A folder in diffusers' format, or something that can be a hub id; the network is not asked."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ConfigurationError(
                f"--model {model}: the folder has no model_index.json, so it is no diffusers pipeline."
            )
    elif path.is_file():
        raise ConfigurationError(
            f"--model {model}: is a single file. Convert it first: "
            "StableDiffusionPipeline.from_single_file(...).save_pretrained(folder)."
        )
    elif model.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise ConfigurationError(f"--model {model}: no such folder, and no model id (owner/name).")

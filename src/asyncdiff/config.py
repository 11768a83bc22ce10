"""The settings of a run, and how many stages fit a number of devices. Pure: standard library only."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from asyncdiff.errors import ConfigurationError

STATE_FORECASTS = ("none", "linear", "damped")  # what may be made of a state that is read late
FORECASTS = (*STATE_FORECASTS, "latents")
FRESHNESS = ("auto", "paper")
GUIDANCE = ("auto", "split", "together")
CONTROLNET = ("serial", "overlap", "ahead")
MAX_GROUPS = 3  # guidance has two halves, or three (InstructPix2Pix, LEDITS)
AUTO = "auto"
DEFAULT_TOLERANCE = 0.3


@dataclass(frozen=True)
class Settings:
    """What decides the numbers a run computes (docs/method.md, sections 1 to 6); checked when constructed.

    `num_stages` N, `stride` S and `warmup_steps` w are at least 1; `forecast` is `"none"` (the paper),
    `"linear"`, `"damped"` or `"latents"`; `freshness` is `"auto"` (what arrives in time is read in the round
    that produces it) or `"paper"` (everything is read one round late). `tolerance`: after warm-up too, steps
    run in order while the relative error of the forecast is above it; None to never look. `groups`: 1, or the
    number of groups of devices that share the batch of a denoiser call (the guidance halves), each with the
    whole denoiser. `guidance_refresh`: after warm-up, in how many steps both halves of guidance are evaluated
    once, in the others only one (section 7). Raises `ConfigurationError` for anything else.
    """

    num_stages: int
    stride: int = 1
    warmup_steps: int = 1
    time_shift: bool = False
    forecast: str = "latents"
    freshness: str = "auto"
    tolerance: float | None = None
    groups: int = 1
    guidance_refresh: int = 1

    def __post_init__(self) -> None:
        check_count("num_stages", self.num_stages)
        check_count("stride", self.stride)
        check_count("warmup_steps", self.warmup_steps)
        if not isinstance(self.time_shift, bool):
            raise ConfigurationError(f"time_shift must be True or False, but {self.time_shift!r} was given.")
        if self.forecast not in FORECASTS:
            raise ConfigurationError(
                f'forecast must be "none", "linear", "damped" or "latents", but {self.forecast!r} was given.'
            )
        if self.freshness not in FRESHNESS:
            raise ConfigurationError(
                f'freshness must be "auto" or "paper", but {self.freshness!r} was given.'
            )
        if self.tolerance is not None and not _is_positive(self.tolerance):
            raise ConfigurationError(f"tolerance must be a number above 0, but {self.tolerance!r} was given.")
        if check_count("groups", self.groups) > MAX_GROUPS:
            raise ConfigurationError(f"groups must be at most {MAX_GROUPS}, but {self.groups} was given.")
        if check_count("guidance_refresh", self.guidance_refresh) > 1:
            self._check_refresh()

    def _check_refresh(self) -> None:
        refresh = f"guidance_refresh={self.guidance_refresh}"
        if self.groups > 1:
            raise ConfigurationError(
                f'{refresh} and guidance="split" exclude each other: the devices of the other half would do '
                'nothing most of the time. Use guidance="together".'
            )
        if self.stride > 1:
            raise ConfigurationError(f"{refresh} goes with stride=1, but {self.stride} was given.")
        if self.time_shift:
            raise ConfigurationError(f"{refresh} goes with time_shift=False, but True was given.")
        if self.tolerance is not None:
            raise ConfigurationError(
                f'{refresh} goes with a number of warmup_steps, but "auto" was given (tolerance '
                f"{self.tolerance:g})."
            )
        if self.num_stages > 1 and self.forecast != "latents":
            raise ConfigurationError(
                f'{refresh} with {self.num_stages} stages needs forecast="latents", but "{self.forecast}" '
                "was given: states of a half that is left out cannot be continued."
            )

    @property
    def group_size(self) -> int:
        """Devices of a group: one per stage, and `stride` for the stage that predicts."""
        return self.num_stages + self.stride - 1

    @property
    def num_workers(self) -> int:
        """Devices it takes: those of all groups."""
        return self.groups * self.group_size


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def settle_warmup(warmup_steps: int | str, tolerance: float | None) -> tuple[int, float | None]:
    """(steps of warm-up, tolerance) of `Settings`, for what a user gives: a number, or "auto" with or without
    a tolerance. `ConfigurationError` for anything else.
    """
    if warmup_steps == AUTO:
        return 1, DEFAULT_TOLERANCE if tolerance is None else tolerance
    if tolerance is not None:
        raise ConfigurationError(
            f'tolerance={tolerance} goes with warmup_steps="auto", but warmup_steps={warmup_steps!r} was '
            "given."
        )
    if isinstance(warmup_steps, str):
        raise ConfigurationError(
            f'warmup_steps must be an integer or "auto", but {warmup_steps!r} was given.'
        )
    return check_count("warmup_steps", warmup_steps), None


def check_count(name: str, value: object, least: int = 1) -> int:
    """`value` if it is an integer of at least `least`, else `ConfigurationError` naming the setting.

    Booleans and numbers written as strings are refused: both are slips, and True would silently mean 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigurationError(
            f"{name} must be an integer, but {value!r} ({type(value).__name__}) was given."
        )
    if value < least:
        raise ConfigurationError(f"{name} must be at least {least}, but {value} was given.")
    return value


def settle(num_devices: int | None, num_stages: int | None, stride: int) -> tuple[int, int]:
    """(number of stages, number of workers) for what was given of devices and stages.

    Devices only: as many stages as they carry. Stages only (local execution): the workers they need.
    Both: they must fit exactly. Raises `ConfigurationError` otherwise, and where neither is given.
    """
    check_count("stride", stride)
    if num_devices is not None:
        check_count("the number of devices", num_devices)
    if num_stages is not None:
        check_count("num_stages", num_stages)
    if num_devices is None:
        return _from_stages(num_stages, stride)
    if num_stages is None:
        return _from_devices(num_devices, stride)
    return _from_both(num_devices, num_stages, stride)


def settle_groups(num_devices: int | None, num_stages: int | None, stride: int, guidance: str) -> int:
    """How many groups of devices share the batch of a denoiser call (`settle` then takes those of one).

    With `guidance="split"` two, which is also what stages without devices get, or three where two do not fit;
    1 with "together", and with "auto", of which the first denoiser call decides (`can_split`). Raises
    `ConfigurationError` where the devices do not make equal groups.
    """
    check_guidance(guidance)
    check_count("stride", stride)
    if num_stages is not None:
        check_count("num_stages", num_stages)
    if guidance != "split":
        return 1
    for groups in range(2, MAX_GROUPS + 1):
        if num_devices is None or _fit(num_devices, groups, num_stages, stride):
            return groups
    rule = "2 x (num_stages + stride - 1) devices, or 3 x for three-way guidance"
    given = "" if num_stages is None else f"num_stages={num_stages} and "
    least = 2 * ((num_stages or 1) + stride - 1)
    assert num_devices is not None
    raise ConfigurationError(
        f'guidance="split" with {given}stride={stride} needs {rule}, but {num_devices} {_were(num_devices)} '
        f'given. Pass {_devices(least)}, or use guidance="together".'
    )


def check_guidance(guidance: object) -> None:
    """`ConfigurationError` for what is none of `GUIDANCE`."""
    if guidance not in GUIDANCE:
        raise ConfigurationError(
            f'guidance must be "auto", "split" or "together", but {guidance!r} was given.'
        )


def check_controlnet(controlnet: object) -> None:
    """`ConfigurationError` for what is none of `CONTROLNET`."""
    if controlnet not in CONTROLNET:
        raise ConfigurationError(
            f'controlnet must be "serial", "overlap" or "ahead", but {controlnet!r} was given.'
        )


def can_split(num_devices: int | None, num_stages: int | None, stride: int, guidance: str) -> bool:
    """Whether `guidance="auto"` may use the devices as two groups: not where a number of stages was asked
    for, which is one of all devices."""
    return (
        guidance == "auto"
        and num_stages is None
        and num_devices is not None
        and _fit(num_devices, 2, num_stages, stride)
    )


def _fit(num_devices: int, groups: int, num_stages: int | None, stride: int) -> bool:
    """Whether so many devices are equal groups of what the stages need."""
    size, rest = divmod(num_devices, groups)
    return rest == 0 and (size >= stride if num_stages is None else size == num_stages + stride - 1)


def _from_stages(num_stages: int | None, stride: int) -> tuple[int, int]:
    if num_stages is None:
        raise ConfigurationError("Neither devices nor num_stages was given. Pass at least one of them.")
    return num_stages, num_stages + stride - 1


def _from_devices(num_devices: int, stride: int) -> tuple[int, int]:
    if num_devices < stride:
        raise ConfigurationError(
            f"stride={stride} needs at least {_devices(stride)} (num_stages + stride - 1), "
            f"but {num_devices} {_were(num_devices)} given. "
            f"Use stride={num_devices} or less, or pass {_devices(stride)} or more."
        )
    return num_devices - stride + 1, num_devices


def _from_both(num_devices: int, num_stages: int, stride: int) -> tuple[int, int]:
    needed = num_stages + stride - 1
    if needed != num_devices:
        raise ConfigurationError(
            f"num_stages={num_stages} with stride={stride} needs {_devices(needed)} "
            f"(num_stages + stride - 1), but {num_devices} {_were(num_devices)} given. "
            f"Use num_stages={num_devices} with stride=1, or pass {_devices(needed)}."
        )
    return num_stages, num_devices


def _devices(count: int) -> str:
    return f"{count} device{'s' * (count != 1)}"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


def available_cores() -> int:
    """CPU cores this process may use (containers and `taskset` allow fewer than there are)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

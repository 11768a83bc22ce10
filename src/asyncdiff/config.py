"""The settings of a run, and how many stages fit a number of devices. Pure: standard library only."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from asyncdiff.errors import ConfigurationError

STATE_FORECASTS = ("none", "linear", "damped")  # what may be made of a state that is read late
FORECASTS = (*STATE_FORECASTS, "latents")
FRESHNESS = ("auto", "paper")
AUTO = "auto"
DEFAULT_TOLERANCE = 0.3


@dataclass(frozen=True)
class Settings:
    """What decides the numbers a run computes (docs/method.md, sections 1 to 6); checked when constructed.

    `num_stages` N, `stride` S and `warmup_steps` w are at least 1; `forecast` is `"none"` (the paper),
    `"linear"`, `"damped"` or `"latents"`; `freshness` is `"auto"` (what arrives in time is read in the round
    that produces it) or `"paper"` (everything is read one round late). `tolerance`: after warm-up too, steps
    run in order while the relative error of the forecast is above it; None to never look. Raises
    `ConfigurationError` for anything else.
    """

    num_stages: int
    stride: int = 1
    warmup_steps: int = 1
    time_shift: bool = False
    forecast: str = "latents"
    freshness: str = "auto"
    tolerance: float | None = None

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

    @property
    def num_workers(self) -> int:
        """Devices it takes: one per stage, and `stride` for the stage that predicts."""
        return self.num_stages + self.stride - 1


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

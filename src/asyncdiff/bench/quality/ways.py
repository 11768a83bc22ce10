"""What is compared with the pictures in order: how many stages, and what a stage reads. Standard library
only."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from asyncdiff.bench.configurations import Configuration, parse_configurations
from asyncdiff.config import FORECASTS, FRESHNESS
from asyncdiff.errors import ConfigurationError

WarmupSteps: TypeAlias = int | Literal["auto"]

AUTO: Literal["auto"] = "auto"
PAPER_FORECAST, PAPER_FRESHNESS = "none", "paper"


@dataclass(frozen=True)
class Way:
    """One way to divide a run, named as `parallelize` names its settings. `partition`: the kind of split,
    None for what the planner chooses."""

    configuration: Configuration
    forecast: str
    freshness: str
    warmup_steps: WarmupSteps = 1
    partition: str | None = None
    guidance_refresh: int = 1

    @property
    def rule(self) -> str:
        """What a stage reads, in words."""
        if (self.forecast, self.freshness) == (PAPER_FORECAST, PAPER_FRESHNESS):
            return "the paper's rule"
        forecast = "no forecast" if self.forecast == PAPER_FORECAST else self.forecast
        rule = forecast if self.freshness == PAPER_FRESHNESS else f"{forecast}, fresh reads"
        return rule if self.guidance_refresh == 1 else f"{rule}, guidance every {self.guidance_refresh}"

    def __str__(self) -> str:
        kind = f" {self.partition}" if self.partition is not None else ""
        return f"{self.configuration}{kind} {self.rule}, w={self.warmup_steps}"

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `parallelize` and `plan`."""
        return {
            "num_stages": self.configuration.num_stages,
            "stride": self.configuration.stride,
            "warmup_steps": self.warmup_steps,
            "forecast": self.forecast,
            "freshness": self.freshness,
            "partition": self.partition,
            "guidance_refresh": self.guidance_refresh,
        }


def parse_ways(
    configs: str,
    forecast: str,
    freshness: str,
    warmup_steps: str,
    num_devices: int | None = None,
    guidance_refresh: str = "1",
) -> tuple[Way, ...]:
    """Every combination of five lists separated by commas, those of one configuration together; those with
    `guidance_refresh` above 1 only as far as there are such ways.

    `num_devices`: what there is of them; None where one device runs all stages in turn. `ConfigurationError`
    names the option and what is wrong in it.
    """
    configurations = parse_configurations(configs, num_devices)
    warmups = tuple(dict.fromkeys(_parse_warmup(part, warmup_steps) for part in _parts(warmup_steps)))
    forecasts = _named("--forecast", forecast, FORECASTS)
    freshnesses = _named("--freshness", freshness, FRESHNESS)
    refreshes = tuple(
        dict.fromkeys(_parse_refresh(part, guidance_refresh) for part in _parts(guidance_refresh))
    )
    combined = itertools.product(configurations, warmups, freshnesses, forecasts, refreshes)
    ways = (Way(each, how, fresh, warmup, None, k) for each, warmup, fresh, how, k in combined)
    found = tuple(way for way in ways if way.guidance_refresh == 1 or _can_refresh(way))
    if not found:
        raise ConfigurationError(
            f"--guidance-refresh {guidance_refresh}: goes with forecast 'latents', stride 1 and a number of "
            "warm-up steps."
        )
    return found


def _can_refresh(way: Way) -> bool:
    is_ahead = way.forecast == "latents" or way.configuration.num_stages == 1
    return is_ahead and way.configuration.stride == 1 and way.warmup_steps != AUTO


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _named(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    for part in _parts(text):
        if part not in known:
            raise ConfigurationError(f"{option} {text}: {part!r} is none of {', '.join(known)}.")
    return tuple(dict.fromkeys(_parts(text)))


def _parse_refresh(part: str, text: str) -> int:
    if not part.isdecimal() or int(part) < 1:
        raise ConfigurationError(f"--guidance-refresh {text}: {part!r} is no number of 1 or more.")
    return int(part)


def _parse_warmup(part: str, text: str) -> WarmupSteps:
    if part == AUTO:
        return AUTO
    if not part.isdecimal() or int(part) < 1:
        raise ConfigurationError(
            f"--warmup-steps {text}: {part!r} is neither 'auto' nor a number of 1 or more. Several are "
            "separated by commas."
        )
    return int(part)

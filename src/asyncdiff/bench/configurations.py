"""Which ways of dividing a denoiser are measured: stages x stride. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from asyncdiff.errors import ConfigurationError

# Rounds that are not counted to the steady state: the first ones after the warm-up fill what later ones read;
# in the last one less is computed, and in the one before it what nobody will read is not sent.
_FIRST_ROUNDS = 2
_LAST_ROUNDS = 2


@dataclass(frozen=True, order=True)
class Configuration:
    """`num_stages` N and `stride` S, written `2x1`; it takes N + S - 1 devices."""

    num_stages: int
    stride: int

    @property
    def num_devices(self) -> int:
        return self.num_stages + self.stride - 1

    def __str__(self) -> str:
        return f"{self.num_stages}x{self.stride}"

    def first_steady_step(self, warmup_steps: int) -> int:
        """The first step of the steady state: after the warm-up and what follows it."""
        return warmup_steps + _FIRST_ROUNDS * self.stride

    def shortest_run(self, warmup_steps: int) -> int:
        """Steps of a run with one round of the steady state in it."""
        return self.run_with_rounds(1, warmup_steps)

    def run_with_rounds(self, rounds: int, warmup_steps: int) -> int:
        """Steps of a run with so many rounds of the steady state in it."""
        return self.first_steady_step(warmup_steps) + (rounds - 1 + _LAST_ROUNDS) * self.stride + 1


def parse_configurations(text: str, num_devices: int | None) -> tuple[Configuration, ...]:
    """`"2x1,3x1"`, or `"auto"`: everything that fits on up to `num_devices` devices and takes more than one.

    `num_devices`: None where one device does what several would; "auto" is then nothing.
    `ConfigurationError` for what is none, and for what does not fit.
    """
    if num_devices is not None and num_devices < 2:
        raise ConfigurationError(
            f"--devices {num_devices}: must be 2 or more, else there is nothing to divide."
        )
    if text.strip() == "auto" and num_devices is not None:
        return _all_that_fit(num_devices)
    return tuple(dict.fromkeys(_parse(part.strip(), text, num_devices) for part in text.split(",")))


def _all_that_fit(num_devices: int) -> tuple[Configuration, ...]:
    """By number of devices, and among those of one number most stages first."""
    return tuple(
        Configuration(count - stride + 1, stride)
        for count in range(2, num_devices + 1)
        for stride in range(1, count + 1)
    )


def _parse(part: str, text: str, num_devices: int | None) -> Configuration:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part)
    if found is None:
        auto = "" if num_devices is None else "'auto', or "
        raise ConfigurationError(
            f"--configs {text}: {part!r} is no configuration. Use {auto}STAGESxSTRIDE such as 2x1,2x2."
        )
    configuration = Configuration(int(found[1]), int(found[2]))
    most = configuration.num_devices if num_devices is None else num_devices
    if not 2 <= configuration.num_devices <= most:
        limit = "2 or more" if num_devices is None else f"2 to {num_devices}, the number of --devices"
        raise ConfigurationError(
            f"--configs {text}: {configuration} takes {configuration.num_devices} devices (stages + stride - "
            f"1), but must take {limit}."
        )
    return configuration

"""The machine a schedule is simulated on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from asyncdiff.errors import ConfigurationError

# Latency and bandwidth of one direction of one link, as a transfer between two processes sees them.
# Bandwidths are about 80 % of the nominal figures (NVLink of an A100 pair 300 GB/s, PCIe 4.0 x16 32 GB/s,
# 3.0 x16 16 GB/s, 10 Gbit/s Ethernet); latencies are orders of magnitude. Rough on purpose: measure, then
# state your own Machine.
PRESETS = {
    "nvlink": (10e-6, 240e9),
    "pcie4": (15e-6, 25e9),
    "pcie3": (20e-6, 12e9),
    "10gbe": (50e-6, 1.0e9),
}


@dataclass(frozen=True)
class Machine:
    """Devices and the links between every two of them.

    `device_speeds`: one per rank, 1.0 is the device on which the segment seconds were measured, 2.0 is twice
    as fast. `latency_s` and `bandwidth_bytes_per_s` are those of each link; every ordered pair of ranks has
    its own, so links do not slow each other down. `busy_speed`: what part of its speed a device keeps while
    all others compute too (cores of one processor share memory and power); it counts in every round that does
    not run in order, also for a device whose neighbours happen to wait. Raises `ConfigurationError` for
    speeds or bandwidths that are not positive.
    """

    device_speeds: tuple[float, ...]
    latency_s: float = 0.0
    bandwidth_bytes_per_s: float = math.inf
    busy_speed: float = 1.0

    def __post_init__(self) -> None:
        if not self.device_speeds or any(not speed > 0 for speed in self.device_speeds):
            raise ConfigurationError(f"Device speeds must be positive, but {self.device_speeds} were given.")
        if not 0 < self.busy_speed <= 1:
            raise ConfigurationError(f"busy_speed must be above 0 and at most 1, but is {self.busy_speed}.")
        if not self.bandwidth_bytes_per_s > 0 or not self.latency_s >= 0:
            raise ConfigurationError(
                f"A link needs a positive bandwidth and a latency of at least 0, but "
                f"{self.bandwidth_bytes_per_s} bytes/s and {self.latency_s} s were given."
            )

    @classmethod
    def preset(cls, name: str, num_devices: int) -> Machine:
        """`num_devices` equal devices with links called `nvlink`, `pcie4`, `pcie3` or `10gbe`."""
        if name not in PRESETS:
            raise ConfigurationError(f"There is no machine {name!r}. Known are {', '.join(sorted(PRESETS))}.")
        return cls((1.0,) * num_devices, *PRESETS[name])

    def transfer_s(self, num_bytes: float) -> float:
        """How long a message is under way on a free link."""
        return self.latency_s + num_bytes / self.bandwidth_bytes_per_s

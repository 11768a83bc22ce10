"""Latency and bandwidth between devices of this machine, through the transport that stages use.

python -m asyncdiff.bench.link --devices cpu,cpu
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from asyncdiff.bench import command
from asyncdiff.errors import AsyncDiffError, ConfigurationError

_TIMEOUT_S = 120.0
_POLL_S = 0.05


@dataclass(frozen=True)
class LinkSpeed:
    """Of one direction. `backend`: what carries the tensors. `one_way_s`: (bytes, median seconds) of half a
    round trip, from handing a tensor over until the receiver has it."""

    devices: tuple[str, str]
    backend: str
    one_way_s: tuple[tuple[int, float], ...]

    @property
    def latency_s(self) -> float:
        """Of the smallest message."""
        return self.one_way_s[0][1]

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Of what the largest message takes longer than the smallest."""
        (small, small_s), (large, large_s) = self.one_way_s[0], self.one_way_s[-1]
        return (large - small) / max(large_s - small_s, 1e-9)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "latency_s": self.latency_s,
            "bandwidth_bytes_per_s": self.bandwidth_bytes_per_s,
        }


def measure_links(devices: Sequence[str]) -> tuple[LinkSpeed, ...]:
    """Every pair of device names that stages one after the other have, and the last with the first."""
    names = [*devices, devices[0]] if len(devices) > 2 else list(devices)
    pairs = dict.fromkeys(pairwise(names))
    return tuple(measure_link(first, second) for first, second in pairs)


def measure_link(first: str, second: str) -> LinkSpeed:
    """Start a process for each device that play ping-pong; both are gone afterwards. `AsyncDiffError` with
    the last line of the one that failed."""
    with tempfile.TemporaryDirectory(prefix="asyncdiff-link-") as folder:
        ends = [_start_end(rank, folder, first, second) for rank in range(2)]
        answers = [Path(folder, f"rank-{rank}.json") for rank in range(2)]
        try:
            _wait(ends, answers)
            failed = next((end for end in ends if end.poll()), None)
            if failed is not None:
                raise AsyncDiffError(f"{first} and {second} exchange nothing: {_last_line(failed)}")
            measured = json.loads(answers[0].read_text(encoding="utf-8"))
        finally:
            for end in ends:
                end.kill()
                end.communicate()
    sizes = tuple((size, seconds) for size, seconds in measured["one_way_s"])
    return LinkSpeed((first, second), measured["backend"], sizes)


def _start_end(rank: int, folder: str, first: str, second: str) -> subprocess.Popen[str]:
    arguments = [str(rank), folder, first, second]
    return subprocess.Popen(
        [sys.executable, "-m", "asyncdiff.bench.link_process", *arguments],
        stdin=subprocess.PIPE,  # it keeps its end of the connection open until this closes
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait(ends: Sequence[subprocess.Popen[str]], answers: Sequence[Path]) -> None:
    """Until both have their figures or one has failed."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not all(answer.exists() for answer in answers) and not any(end.poll() for end in ends):
        if time.monotonic() > deadline:
            raise AsyncDiffError(f"Two processes exchanged nothing within {_TIMEOUT_S:.0f} s.")
        time.sleep(_POLL_S)


def _last_line(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    lines = [line.strip() for line in process.stderr if line.strip()]
    return lines[-1] if lines else "ended without a word"


def main(devices: command.DevicesOption = "cpu,cpu", json_file: command.JsonOption = None) -> None:
    """Measure the links between devices of this machine."""
    names = [name.strip() for name in devices.split(",")]
    if len(names) < 2 or not all(names):
        raise ConfigurationError(f"--devices {devices}: name two or more, such as cpu,cpu or cuda:0,cuda:1.")
    links = measure_links(names)
    command.finish("link", {"links": [link.to_json() for link in links]}, json_file)
    rows = [
        (
            " - ".join(link.devices), link.backend, f"{link.latency_s * 1e6:.0f} us",
            f"{link.bandwidth_bytes_per_s / 1e9:.2f} GB/s",
            ", ".join(f"{size / 1e6:g} MB {seconds * 1e3:.3f} ms" for size, seconds in link.one_way_s),
        )
        for link in links
    ]  # fmt: skip
    command.show_table("Links", ("devices", "through", "latency", "bandwidth", "one way"), rows)


if __name__ == "__main__":
    command.run_command(main)

"""When the steps of a run ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch


@dataclass(frozen=True)
class TimedRun:
    """`seconds`: of the whole call. `step_ends`: seconds from its start to the end of each step."""

    seconds: float
    step_ends: tuple[float, ...]

    def step_seconds(self, first_step: int = 0) -> list[float]:
        """Of every step from this one on; the first of a pipeline includes the encoding of the text."""
        return [after - before for before, after in pairwise((0.0, *self.step_ends))][first_step:]

    def round_seconds(self, first_step: int, stride: int) -> list[float]:
        """Of rounds of `stride` steps from `first_step` on, per step; without the last two rounds, in which
        not everything is computed, and what nobody will read is not sent."""
        count = (len(self.step_ends) - 1 - first_step) // stride - 1
        ends = self.step_ends[first_step - 1 : first_step + count * stride : stride]
        return [(after - before) / stride for before, after in pairwise(ends)]

    def to_json(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "step_ends": list(self.step_ends)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TimedRun:
        return cls(values["seconds"], tuple(values["step_ends"]))


class StepEnds:
    """Starts when made; `mark` at every step's end.

    On CUDA by events: a host that waits for the device after every step delays what asynchronous stages send.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ends: list[Any] = []
        self._wait()
        self._start_s = time.perf_counter()
        self._start = self._now()

    def mark(self) -> None:
        self._ends.append(self._now())

    def finish(self) -> TimedRun:
        """The run, waited for."""
        self._wait()
        seconds = time.perf_counter() - self._start_s
        return TimedRun(seconds, tuple(self._seconds_to(self._ends)))

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _seconds_to(self, ends: Sequence[Any]) -> list[float]:
        if self._device.type != "cuda":
            return [end - self._start for end in ends]
        return [self._start.elapsed_time(end) / 1e3 for end in ends]

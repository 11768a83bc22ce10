"""What a pipeline does by itself between two denoiser calls: guidance, the noise scheduler, callbacks."""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from asyncdiff.pipeline.denoiser import CapturedCall, call_until_captured

_LEAST_INTERVALS = 8
_MOST_CALLS_OF_THE_PIPELINE = 4


def time_driver(
    pipe: Any, denoisers: Iterable[nn.Module], call: Mapping[str, Any], output: Any, device: torch.device
) -> float:
    """Mean seconds from the return of a denoiser call to the next one, in `pipe(**call)`.

    `output`: what the denoiser is made to return, at once. A run of few steps is repeated, and broken off
    before the pipeline decodes a picture. 0.0 for a run of one denoiser call.
    """
    modules = tuple(denoisers)
    intervals: list[float] = []
    for _ in range(_MOST_CALLS_OF_THE_PIPELINE):
        stand_in = _StandIn(output, device, min(_LEAST_INTERVALS + 2, _num_steps(pipe, call)))
        call_until_captured(pipe, modules, call, stand_in)
        intervals += stand_in.intervals
        if not stand_in.intervals or len(intervals) > _LEAST_INTERVALS:
            break
    # The first one is not timed: kernels and caches are cold.
    return statistics.fmean(intervals[1:] or intervals or [0.0])


def _num_steps(pipe: Any, call: Mapping[str, Any]) -> float:
    """How many denoiser calls the run makes at least; infinite where that is not to be seen."""
    parameters = inspect.signature(pipe.__call__).parameters
    for name in ("num_inference_steps", "num_steps"):
        steps = call.get(name, parameters[name].default if name in parameters else None)
        if isinstance(steps, int):
            return steps
    return math.inf


class _StandIn:
    """A denoiser that takes no time, and notes how long the pipeline took between its calls."""

    def __init__(self, output: Any, device: torch.device, most_calls: float) -> None:
        self.intervals: list[float] = []
        self._output = output
        self._device = device
        self._most_calls = most_calls
        self._returned_s: float | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._returned_s is not None:
            self.intervals.append(now - self._returned_s)
        if len(self.intervals) + 1 >= self._most_calls:
            raise CapturedCall(args, kwargs)
        self._returned_s = time.perf_counter()
        return self._output

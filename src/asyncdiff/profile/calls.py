"""How long each call of the denoiser takes, measured in forwards of the whole denoiser."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from asyncdiff.graph import BlockKey
from asyncdiff.trace import Inputs

_UNTIMED_RUNS = 1


def time_calls(
    module: nn.Module,
    inputs: Inputs,
    keys: Collection[BlockKey],
    device: torch.device,
    *,
    runs: int = 3,
    threads: int | None = None,
) -> dict[BlockKey, float]:
    """Median seconds of each named call over `runs` forwards, after one untimed. The module holds all its
    weights.

    `threads`: intra-op threads during the measurement, as a worker will have. On CUDA every call is
    synchronised, which adds launch latency to small ones.
    """
    seconds: dict[BlockKey, list[float]] = {key: [] for key in keys}
    paths = {key.path for key in keys}
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with ExitStack() as timers, torch.no_grad():
            timed = [
                timers.enter_context(_timed(module.get_submodule(path), path, device))
                for path in sorted(paths)
            ]
            for run in range(_UNTIMED_RUNS + runs):
                for timer in timed:
                    timer.seconds.clear()
                module(**inputs.rebuild())
                if run >= _UNTIMED_RUNS:
                    for timer in timed:
                        _collect(seconds, timer)
    finally:
        torch.set_num_threads(before)
    return {key: statistics.median(values) for key, values in seconds.items() if values}


class _Timer:
    """Stands in for a module's forward and notes how long each call of it takes."""

    def __init__(self, forward: Callable[..., Any], path: str, device: torch.device) -> None:
        self.path = path
        self.seconds: list[float] = []
        self._forward = forward
        self._device = device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = self._now()
        try:
            return self._forward(*args, **kwargs)
        finally:
            self.seconds.append(self._now() - start)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@contextmanager
def _timed(module: nn.Module, path: str, device: torch.device) -> Iterator[_Timer]:
    before = vars(module).get("forward")
    timer = _Timer(module.forward, path, device)
    vars(module)["forward"] = timer
    try:
        yield timer
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before


def _collect(seconds: dict[BlockKey, list[float]], timer: _Timer) -> None:
    for call, value in enumerate(timer.seconds):
        key = BlockKey(timer.path, call)
        if key in seconds:
            seconds[key].append(value)

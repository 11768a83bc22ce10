"""How long each call of the denoiser takes, measured in forwards of the whole denoiser."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
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
    """Seconds of each named call, over `runs` forwards after one untimed. The module holds all its weights.

    Medians are taken of what a call does outside of the timed calls below it, and added up: so what lies in a
    call never takes longer than the call. `threads`: intra-op threads during the measurement, as a worker
    will have. On CUDA every call is synchronised, which adds launch latency to small ones.
    """
    own: dict[BlockKey, list[float]] = {}
    below: dict[BlockKey, list[BlockKey]] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        for run in range(_UNTIMED_RUNS + runs):
            clock = _Clock(device)
            with ExitStack() as timers, torch.no_grad():
                for path in sorted({key.path for key in keys}):
                    timers.enter_context(_timed(module.get_submodule(path), path, clock))
                module(**inputs.rebuild())
            if run >= _UNTIMED_RUNS:
                for key, seconds in clock.own_seconds.items():
                    own.setdefault(key, []).append(seconds)
                below = clock.below
    finally:
        torch.set_num_threads(before)

    def seconds_of(key: BlockKey) -> float:
        return statistics.median(own[key]) + sum(map(seconds_of, below.get(key, ())))

    return {key: seconds_of(key) for key in keys if key in own}


def add_up(
    seconds: Mapping[BlockKey, float], parents: Mapping[BlockKey, BlockKey | None]
) -> dict[BlockKey, float]:
    """The calls of `parents`, each with what lies in it scaled so that it adds up to the call itself.

    `parents`: the call that each lies in, None for the outermost, which are taken as they are; callers before
    what they call. A container's own operations (concatenated skips) are done where its parts are: without
    this, a finer cut would seem to be less work.
    """
    inside: dict[BlockKey, float] = {}
    for key, parent in parents.items():
        if parent is not None and key in seconds:
            inside[parent] = inside.get(parent, 0.0) + seconds[key]
    found: dict[BlockKey, float] = {}
    for key, parent in parents.items():
        if key in seconds:
            scale = 1.0
            if parent is not None and parent in found and inside[parent] > 0:
                scale = found[parent] / inside[parent]
            found[key] = seconds[key] * scale
    return found


class _Clock:
    """What each timed call of one forward does by itself, and which timed calls lie in it."""

    def __init__(self, device: torch.device) -> None:
        self.own_seconds: dict[BlockKey, float] = {}
        self.below: dict[BlockKey, list[BlockKey]] = {}
        self._device = device
        self._num_calls: Counter[str] = Counter()
        self._running: list[tuple[BlockKey, list[float]]] = []  # with the seconds of what lies in it

    @contextmanager
    def call_of(self, path: str) -> Iterator[None]:
        """One call of a module."""
        key = BlockKey(path, self._num_calls[path])
        self._num_calls[path] += 1
        if self._running:
            self.below.setdefault(self._running[-1][0], []).append(key)
        inside: list[float] = []
        self._running.append((key, inside))
        start = self._now()
        try:
            yield
        finally:
            seconds = self._now() - start
            self._running.pop()
            self.own_seconds[key] = seconds - sum(inside)
            if self._running:
                self._running[-1][1].append(seconds)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _Timer:
    """Stands in for a module's forward."""

    def __init__(self, forward: Callable[..., Any], path: str, clock: _Clock) -> None:
        self._forward = forward
        self._path = path
        self._clock = clock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.call_of(self._path):
            return self._forward(*args, **kwargs)


@contextmanager
def _timed(module: nn.Module, path: str, clock: _Clock) -> Iterator[None]:
    before = vars(module).get("forward")
    vars(module)["forward"] = _Timer(module.forward, path, clock)
    try:
        yield
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before

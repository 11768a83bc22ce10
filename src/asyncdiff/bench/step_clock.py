"""Timing the steps of a pipeline call from outside, the same way whatever runs them."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any

from asyncdiff.bench.progress import Progress, no_progress


class StepClock:
    """Give it to a pipeline call as `callback_on_step_end`; `finish` when the call has returned.

    `seconds`: of the whole call. `seconds_per_step`: median time from one step's end to the next, without the
    first `skip` steps (warm-up, first use of buffers).
    """

    def __init__(self, what: str, *, skip: int = 0, progress: Progress = no_progress) -> None:
        self._what = what
        self._skip = skip
        self._progress = progress
        self._step_ends: list[float] = []
        self._start = time.perf_counter()
        self.seconds = 0.0

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        _wait_for_device(tensors)
        self._step_ends.append(time.perf_counter())
        self._progress(self._what, len(self._step_ends), getattr(pipe, "num_timesteps", 0) or 0)
        return tensors

    def finish(self) -> None:
        self.seconds = time.perf_counter() - self._start

    @property
    def denoise_seconds(self) -> float:
        """From the beginning of the call to the end of its last step: text encoding included, decoding
        not.
        """
        return self._step_ends[-1] - self._start

    @property
    def num_steps(self) -> int:
        return len(self._step_ends)

    @property
    def seconds_per_step(self) -> float:
        """NaN when fewer than two steps were seen after the skipped ones."""
        ends = self._step_ends[max(0, self._skip - 1) :]
        intervals = [after - before for before, after in pairwise(ends)]
        return statistics.median(intervals) if intervals else float("nan")


def _wait_for_device(tensors: dict[str, Any]) -> None:
    import torch

    if any(isinstance(value, torch.Tensor) and value.is_cuda for value in tensors.values()):
        torch.cuda.synchronize()

"""A way to make one generation faster, and what it takes and costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from asyncdiff.bench.architectures import DenoisingLoop
from asyncdiff.bench.threads import intra_op_threads
from asyncdiff.bench.timed_run import TimedRun

Generate: TypeAlias = Callable[[int], tuple[TimedRun, torch.Tensor]]
"""From a number of steps to a timed run, after an untimed one, and its final latents."""

InOrder: TypeAlias = Callable[[int], torch.Tensor]
"""From a number of steps to the final latents without any of this."""


class NotAvailableError(Exception):
    """The denoiser, the devices or this version of diffusers do not have it; the message says why."""


@dataclass(frozen=True)
class ComparisonRun:
    """`seconds_per_step`: of every step of the run. Where some steps are computed in full and others are not,
    their median says nothing: use `seconds`, of the whole run. `relative_error`: L2 distance of the final
    latents from those in order, over the norm of those; 0 from a cache that never left anything out; None if
    one of them is not finite. `not_available`: why there are no figures, else None.
    """

    seconds_per_step: list[float] = field(default_factory=list)
    seconds: float = math.nan
    relative_error: float | None = None
    not_available: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A row. `devices`: how many it uses. `settings`: what diffusers is given, for people."""

    name: str
    devices: int
    settings: str
    generate: Generate
    in_order: InOrder

    def measure(self, steps: int) -> ComparisonRun:
        """One generation in `steps` steps, after an untimed short one."""
        try:
            run, latents = self.generate(steps)
        except NotAvailableError as refusal:
            return ComparisonRun(not_available=str(refusal))
        error = relative_error(latents, self.in_order(steps))
        return ComparisonRun(run.step_seconds(), run.seconds, error)


def relative_error(latents: torch.Tensor, reference: torch.Tensor) -> float | None:
    """Relative L2; None if it is not finite."""
    exact = reference.cpu().double()
    error = ((latents.cpu().double() - exact).norm() / exact.norm()).item()
    return error if math.isfinite(error) else None


@contextmanager
def on_one_device(loop: DenoisingLoop, device: str, threads: int | None) -> Iterator[None]:
    """The loop there for a while, with so many intra-op threads (None: as many as there are)."""
    home = loop.device
    with intra_op_threads(threads):
        try:
            loop.to(device)
            yield
        finally:
            loop.to(str(home))

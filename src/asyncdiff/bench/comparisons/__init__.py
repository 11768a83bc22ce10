"""What else makes a generation faster, measured the same way: diffusers' own context parallelism and caches.

Everything here is diffusers' own, switched on as its documentation does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from asyncdiff.bench.architectures import DenoisingLoop
from asyncdiff.bench.comparisons import caching, context_parallel
from asyncdiff.bench.comparisons.comparison import Comparison, ComparisonRun, NotAvailableError, on_one_device

__all__ = ["Comparison", "ComparisonRun", "NotAvailableError", "comparisons_for"]


def comparisons_for(loop: DenoisingLoop, devices: Sequence[str], threads: int | None = 1) -> list[Comparison]:
    """Context parallelism on all devices, caches on the first; also those that this denoiser cannot have.

    `loop`: of `build_denoiser` with its default seed, for other processes build the denoiser again; not
    parallelized while one is measured. `threads`: intra-op threads of every process, None for torch's own.
    """

    @lru_cache(maxsize=1)
    def in_order(steps: int) -> torch.Tensor:
        with on_one_device(loop, devices[0], threads):
            return loop(steps).cpu()

    return [
        *context_parallel.comparisons(loop, devices, threads, in_order),
        *caching.comparisons(loop, devices[0], threads, in_order),
    ]

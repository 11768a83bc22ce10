"""Whether a benchmark's denoisers fit into this machine's memory, before any is built."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from asyncdiff.bench.architectures import architecture_named, build_denoiser
from asyncdiff.bench.workload import Workload
from asyncdiff.errors import ConfigurationError


def check_room(workload: Workload, devices: Sequence[str]) -> None:
    """`ConfigurationError` where memory has no room for a whole denoiser on every CPU among `devices`, which
    may name one several times.

    Too much would end in a process killed by the system, or in a machine that does nothing but swap. How
    large a `model` is, is known only when it is loaded: nothing is checked then.
    """
    copies = sum(torch.device(name).type == "cpu" for name in devices)
    if workload.arch is None or not copies:
        return
    architecture, dtype = architecture_named(workload.arch), getattr(torch, workload.dtype)
    denoiser = build_denoiser(architecture, dtype, weightless=True)
    needed = copies * sum(parameter.nbytes for parameter in denoiser.parameters())
    available = psutil.virtual_memory().available
    if needed > available:
        raise ConfigurationError(
            f"This holds {copies} whole denoisers of {workload.arch} in {workload.dtype} at a time, "
            f"{needed / 1e9:.1f} GB, but {available / 1e9:.1f} GB of memory are available: use a smaller "
            f"--arch or --dtype, or fewer --devices."
        )

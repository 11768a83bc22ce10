"""One process of a context-parallel run: torchrun starts `-m asyncdiff.bench.comparisons.rank FOLDER`."""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from asyncdiff.bench.architectures import DenoisingLoop, build_denoiser
from asyncdiff.bench.comparisons.context_parallel import ANSWER, REQUEST, Request
from asyncdiff.bench.timed_run import StepEnds
from asyncdiff.launch.default_group import ensure_default_group, torchrun_local_rank

_UNTIMED_STEPS = 2


def main() -> None:
    folder = Path(sys.argv[1])
    request: Request = pickle.loads((folder / REQUEST).read_bytes())
    rank = torchrun_local_rank()
    device = torch.device(request.devices[rank])
    denoiser = build_denoiser(request.architecture, request.dtype)
    loop = DenoisingLoop(request.architecture, denoiser, 0, request.dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        loop.to(str(device))
        ensure_default_group("nccl")
    else:
        ensure_default_group("gloo")
    _parallelize(denoiser, device, request.attention, len(request.devices))
    loop(_UNTIMED_STEPS)
    ends = StepEnds(device)
    latents = loop(request.steps, lambda step: ends.mark())
    answer = (ends.finish(), latents.cpu())
    if rank == 0:  # all end a step together, when they have gathered its prediction
        (folder / ANSWER).write_bytes(pickle.dumps(answer))


def _parallelize(denoiser: nn.Module, device: torch.device, attention: str, degree: int) -> None:
    from diffusers import ContextParallelConfig

    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(_cpu_as_accelerator())
        elif attention == "ring":
            denoiser.set_attention_backend("_native_cudnn")  # type: ignore[operator]
        config = ContextParallelConfig(**{f"{attention}_degree": degree})
        denoiser.enable_parallelism(config=config)  # type: ignore[operator]


@contextlib.contextmanager
def _cpu_as_accelerator() -> Iterator[None]:
    """diffusers 0.42 puts rank r on accelerator r % `device_count()`: division by zero where there is none.

    That is all that keeps it from CPUs: Ulysses attention itself runs over gloo.
    """
    with (
        mock.patch.object(torch._C, "_get_accelerator", return_value=torch.device("cpu")),
        mock.patch.object(torch.accelerator, "device_count", return_value=1),
    ):
        yield


if __name__ == "__main__":
    main()

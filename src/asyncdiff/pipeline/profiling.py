"""Measuring what a plan is made from: the denoiser's blocks and the pipeline's own work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asyncdiff.graph import BlockKey
from asyncdiff.pipeline.denoiser import replaced_forward
from asyncdiff.pipeline.driver_work import time_driver
from asyncdiff.profile import add_up, time_calls
from asyncdiff.trace import Inputs, Recording, call_costs


@dataclass(frozen=True)
class Profile:
    """Seconds of each call that can become a block and of the whole forward, and of the pipeline's own work
    per denoiser call."""

    block_seconds: Mapping[BlockKey, float]
    driver_seconds: float


def profile_blocks(
    denoiser: nn.Module, inputs: Inputs, recording: Recording, device: torch.device, threads: int | None
) -> dict[BlockKey, float]:
    """Seconds of every call that can become a block and of the whole forward, on the device that the denoiser
    is on."""
    parents = {key: cost.parent for key, cost in call_costs(recording).items()}
    whole = recording.calls[0].key
    with replaced_forward(denoiser, None):
        seconds = time_calls(denoiser, inputs, [whole, *parents], device, threads=threads)
    return {whole: seconds[whole], **add_up(seconds, parents)}


def profile_pipeline(
    pipe: Any,
    denoisers: Iterable[nn.Module],
    call: Mapping[str, Any],
    inputs: Inputs,
    recording: Recording,
    device: torch.device,
    threads: int | None,
    whole: Inputs | None = None,
) -> Profile:
    """Measure the first of the denoisers with `inputs`, and the pipeline in `pipe(**call)`.

    `whole`: the inputs of the pipeline's own calls, where `inputs` is one part of their batch.
    """
    modules = tuple(denoisers)
    blocks = profile_blocks(modules[0], inputs, recording, device, threads)
    with replaced_forward(modules[0], None), torch.no_grad():
        output = modules[0](**(whole or inputs).rebuild())
    return Profile(blocks, time_driver(pipe, modules, call, output, device))

"""What `asyncdiff plan` plans for: an architecture or a model, looked at without weights or measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from asyncdiff.bench.architectures import (
    ARCHITECTURES,
    Architecture,
    DenoisingLoop,
    architecture_named,
    build_controlnet,
    build_denoiser,
)
from asyncdiff.bench.loading import load_pipeline
from asyncdiff.bench.progress import Progress
from asyncdiff.cli.arguments import Dtype
from asyncdiff.graph import BlockKey
from asyncdiff.pipeline.controlnet_cost import (
    ExaminedControlNet,
    examine_controlnet,
    has_controlnet,
    returning,
)
from asyncdiff.pipeline.denoiser import denoisers_of, replaced_forward
from asyncdiff.pipeline.devices import Placement
from asyncdiff.pipeline.examination import (
    Examination,
    examine,
    examine_part,
    example_denoiser_call,
    example_inputs,
)
from asyncdiff.pipeline.profiling import Profile, profile_blocks, profile_pipeline
from asyncdiff.pipeline.weightless import load_without_weights
from asyncdiff.profile import relative_speeds
from asyncdiff.trace import Inputs, flatten_inputs

_LOOP_CALL = {"num_steps": 10}


@dataclass(frozen=True)
class Request:
    """An architecture's name or a model's id or folder; the other is None. `size`: pixels, None for its
    own."""

    arch: str | None
    model: str | None
    size: int | None
    dtype: Dtype

    @property
    def title(self) -> str:
        size = "" if self.size is None else f", {self.size} px"
        return f"{self.arch or self.model}{size}"


@dataclass(frozen=True)
class Looked:
    """A denoiser call, and one of two parts of its batch; None where the batch cannot be shared.
    `controlnet`: called before it; None where there is none."""

    whole: Examination
    part: Examination | None
    controlnet: ExaminedControlNet | None = None


@dataclass(frozen=True)
class Measured:
    """On the first device; `speeds`: of the devices, None where they are of one kind. `part_seconds`: as the
    profile's, of one of two parts of the batch. `controlnet_seconds`: of a call of it."""

    profile: Profile
    speeds: tuple[float, ...] | None
    part_seconds: Mapping[BlockKey, float] | None
    controlnet_seconds: float | None = None


def torch_dtype(dtype: Dtype, device: str) -> torch.dtype:
    """The dtype that is meant: float16, on a CPU float32, where it is left open."""
    if dtype == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.float16
    found: torch.dtype = getattr(torch, dtype)
    return found


def look_at(request: Request, device: str, report: Progress) -> Looked:
    """Record a denoiser call without any weights; `ConfigurationError` where that is not enough."""
    dtype = torch_dtype(request.dtype, device)
    report("Looking at the denoiser", 0, 0)
    if request.arch is not None:
        architecture = _architecture(request)
        denoiser = build_denoiser(architecture, dtype, weightless=True)
        inputs = flatten_inputs(type(denoiser).forward, (), architecture.inputs(dtype))
        pipe: Any = None
        call: Mapping[str, Any] = _LOOP_CALL
        if architecture.controlnet_class is not None:
            controlnet = build_controlnet(architecture, dtype, weightless=True)
            pipe = DenoisingLoop(architecture, denoiser, _size(request, architecture), dtype, controlnet)
    else:
        assert request.model is not None
        pipe = load_without_weights(str(Path(request.model).expanduser()), dtype)
        denoiser, inputs = example_denoiser_call(pipe, request.size)
        call = example_inputs(pipe, request.size)[0] if has_controlnet(pipe) else {}
    beside = examine_controlnet(pipe, call, weights_at_hand=False) if has_controlnet(pipe) else None
    if beside is not None:
        inputs = beside.denoiser_inputs
    part = examine_part(denoiser, inputs, weights_at_hand=False)
    whole = examine(denoiser, inputs, weights_at_hand=False)
    return _looked(whole, None if part is None else part[0], beside)


def measure(
    request: Request, devices: Sequence[str], threads: int | None, report: Progress
) -> tuple[Looked, Measured]:
    """Load it (an architecture: with random weights) on the first device, and time it there."""
    device = torch.device(devices[0])
    if request.arch is not None:
        report("Building the denoiser", 0, 0)
        architecture, dtype = _architecture(request), torch_dtype(request.dtype, devices[0])
        denoiser = build_denoiser(architecture, dtype).to(device)
        moved = send_to_device(architecture.inputs(dtype), device)
        inputs = flatten_inputs(type(denoiser).forward, (), moved)
        pipe: Any = None
        call: Mapping[str, Any] = _LOOP_CALL
        if architecture.noise_scheduler is not None:
            side, controlnet = _size(request, architecture), build_controlnet(architecture, dtype)
            pipe = DenoisingLoop(architecture, denoiser, side, dtype, controlnet).to(str(device))
    else:
        assert request.model is not None
        report("Loading the model", 0, 0)
        pipe = load_pipeline(request.model, request.dtype, devices[0])
        denoiser = next(iter(denoisers_of(pipe).values()))
        call, inputs = example_inputs(pipe, request.size)
    beside, controlnet_seconds = None, None
    if has_controlnet(pipe):
        beside = examine_controlnet(pipe, call, weights_at_hand=True)
        inputs = beside.denoiser_inputs
    examination = examine(denoiser, inputs, weights_at_hand=True)
    report("Timing the blocks", 0, 0)
    with ExitStack() as stack:
        if beside is not None:
            controlnet_seconds = beside.measured_seconds(device, threads)
            # Else it would count as the pipeline's own work.
            stack.enter_context(replaced_forward(beside.module, returning(beside.output, beside.inputs)))
        profile = _profile(pipe, denoiser, call, inputs, examination, device, threads)
    part = examine_part(denoiser, inputs, weights_at_hand=True)
    part_seconds = None
    if part is not None:
        part_seconds = profile_blocks(denoiser, part[1], part[0].recording, device, threads)
    with replaced_forward(denoiser, None):
        speeds = relative_speeds(denoiser, examination.weights, inputs, devices, threads)
    looked = _looked(examination, None if part is None else part[0], beside)
    return looked, Measured(profile, speeds, part_seconds, controlnet_seconds)


def _profile(
    pipe: Any,
    denoiser: nn.Module,
    call: Mapping[str, Any],
    inputs: Inputs,
    examination: Examination,
    device: torch.device,
    threads: int | None,
) -> Profile:
    recording = examination.recording
    if pipe is None:  # an architecture whose loop is not one denoiser call per step
        return Profile(profile_blocks(denoiser, inputs, recording, device, threads), 0.0)
    modules = [denoiser, *(each for each in denoisers_of(pipe).values() if each is not denoiser)]
    return profile_pipeline(pipe, modules, call, inputs, recording, device, threads)


def given_seconds(
    examination: Examination, block_ms: Mapping[str, float], device: str
) -> dict[BlockKey, float]:
    """Seconds of every call from a file's milliseconds of some; `ConfigurationError` for unknown names."""
    given = {name: milliseconds / 1e3 for name, milliseconds in block_ms.items()}
    return examination.complete_seconds(given, torch.device(device).type)


def _architecture(request: Request) -> Architecture:
    assert request.arch is not None
    found = ARCHITECTURES.get(request.arch) or architecture_named(request.arch)
    return found if request.size is None else replace(found, height=request.size, width=request.size)


def _looked(whole: Examination, part: Examination | None, controlnet: ExaminedControlNet | None) -> Looked:
    if controlnet is None:
        return Looked(whole, part)
    return Looked(controlnet.before(whole), part and controlnet.before(part), controlnet)


def _size(request: Request, architecture: Architecture) -> int:
    return request.size or architecture.height


def threads_per_device(devices: Sequence[str]) -> int | None:
    """What every CPU device computes with, so that candidates of fewer devices are compared on equal ones."""
    return Placement("spawn", tuple(devices), len(devices)).threads_per_device

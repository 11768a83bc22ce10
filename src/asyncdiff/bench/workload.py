"""What a benchmark runs: an architecture with random weights in a loop of its own, or a real pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from asyncdiff.bench.architectures import (
    DenoisingLoop,
    architecture_named,
    build_controlnet,
    build_denoiser,
)
from asyncdiff.bench.loading import load_pipeline
from asyncdiff.bench.timed_run import StepEnds, TimedRun
from asyncdiff.errors import ConfigurationError
from asyncdiff.pipeline.denoiser import denoisers_of
from asyncdiff.weights import resident_bytes

DEMO = "demo"


@dataclass(frozen=True)
class Workload:
    """An architecture's name (`arch`) or a hub id, folder or "demo" (`model`); the other is None.

    `size`: height and width in pixels, None for a pipeline's own. `dtype`: a torch name, or "auto" with a
    model. `prompt`: for a model. `batch`: of an architecture's denoiser call, None for its own.
    `with_controlnet`: an architecture's ControlNet is called too, where it has one. `channels_last`: the
    denoiser's weights are kept in that memory format.
    """

    arch: str | None
    model: str | None
    size: int | None
    dtype: str
    prompt: str = ""
    batch: int | None = None
    with_controlnet: bool = False
    channels_last: bool = False

    @property
    def title(self) -> str:
        """One line for people."""
        parts = [str(self.arch or self.model)]
        if self.size is not None:
            parts.append(f"{self.size} px")
        parts.append(self.dtype if self.dtype != "auto" else "the default dtype")
        return ", ".join([*parts, "channels last"] if self.channels_last else parts)


def dtype_of_random_weights(name: str, devices: Sequence[str]) -> str:
    """What "auto" stands for on these devices; any other name as it is.

    It is bfloat16, as checkpoints are today, or float32 where one of the devices is a CPU without
    instructions for that, on which a step would take many times as long.
    """
    if name != "auto":
        return name
    can_do = torch.cpu.get_capabilities()
    has_bfloat16 = any(can_do.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    is_slow = not has_bfloat16 and any(torch.device(name).type == "cpu" for name in devices)
    return "float32" if is_slow else "bfloat16"


class Subject(Protocol):
    """A loaded workload on `device`. `pipe`: what `parallelize` takes. `example`: a call for
    `asyncdiff.plan`."""

    device: torch.device
    pipe: Any
    example: dict[str, Any]

    def call(self, num_steps: int, on_step_end: Callable[[], None]) -> None:
        """Generate once."""


class _LoopSubject:
    def __init__(self, workload: Workload, device: str) -> None:
        assert workload.arch is not None
        assert workload.size is not None
        architecture, dtype = architecture_named(workload.arch), getattr(torch, workload.dtype)
        if workload.batch is not None:
            architecture = replace(architecture, batch=workload.batch)
        denoiser = build_denoiser(architecture, dtype)
        controlnet = build_controlnet(architecture, dtype) if workload.with_controlnet else None
        self.device = torch.device(device)
        self.pipe: Any = DenoisingLoop(architecture, denoiser, workload.size, dtype, controlnet).to(device)
        self.example = {"num_steps": 2}

    def call(self, num_steps: int, on_step_end: Callable[[], None]) -> None:
        self.pipe(num_steps, lambda step: on_step_end())


class _PipelineSubject:
    def __init__(self, workload: Workload, device: str) -> None:
        from asyncdiff.demo import GUIDANCE_SCALE

        is_demo = workload.model == DEMO
        self.device = torch.device(device)
        self.pipe: Any = load_pipeline(None if is_demo else workload.model, workload.dtype, device)
        self.example: dict[str, Any] = {"prompt": workload.prompt}
        if workload.size is not None:
            self.example |= {"height": workload.size, "width": workload.size}
        if is_demo:
            self.example["guidance_scale"] = GUIDANCE_SCALE
        self._check()

    def call(self, num_steps: int, on_step_end: Callable[[], None]) -> None:
        def ended(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step_end()
            return tensors

        self.pipe(
            **self.example,
            num_inference_steps=num_steps,
            generator=torch.Generator("cpu").manual_seed(0),  # the same on every kind of device
            callback_on_step_end=ended,
        )

    def _check(self) -> None:
        needed = {*self.example, "num_inference_steps", "callback_on_step_end"}
        missing = sorted(needed - set(inspect.signature(self.pipe.__call__).parameters))
        if missing:
            raise ConfigurationError(
                f"`asyncdiff bench --model` calls a pipeline with {', '.join(sorted(needed))}, but "
                f"{type(self.pipe).__name__} does not take {', '.join(missing)}. Use --arch instead."
            )


def load(workload: Workload, device: str) -> Subject:
    """Build or load it on `device`; `ConfigurationError` where it cannot be benchmarked."""
    is_loop = workload.arch is not None
    subject = _LoopSubject(workload, device) if is_loop else _PipelineSubject(workload, device)
    if workload.channels_last:
        for denoiser in denoisers_of(subject.pipe).values():
            _keep_channels_last(denoiser)
    return subject


def _keep_channels_last(denoiser: nn.Module) -> None:
    dims = {weight.dim() for weight in denoiser.parameters()}
    if 4 not in dims or 5 in dims:
        what = "some of five" if 5 in dims else "none"
        raise ConfigurationError(
            f"--channels-last is for weights of four dimensions, and {type(denoiser).__name__} has {what}."
        )
    nn.Module.to(denoiser, memory_format=torch.channels_last)  # type: ignore[call-overload]


def run_timed(subject: Subject, num_steps: int) -> TimedRun:
    """One call and its step ends."""
    ends = StepEnds(subject.device)
    subject.call(num_steps, ends.mark)
    return ends.finish()


def denoiser_bytes(subject: Subject) -> int:
    """Bytes of all parameters and buffers of the denoiser, or of all denoisers; while they are whole."""
    return sum(map(resident_bytes, denoisers_of(subject.pipe).values()))

"""What a pipeline's ControlNet costs, and which of the denoiser's inputs it makes: found out as `plan` looks
at denoisers, without weights if possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from asyncdiff.errors import ConfigurationError
from asyncdiff.graph import BlockKey
from asyncdiff.pipeline.controlnet import controlnet_of
from asyncdiff.pipeline.denoiser import capture_call, denoisers_of, replaced_forward
from asyncdiff.pipeline.examination import Examination, examine, with_values
from asyncdiff.planner import ControlNetCost, estimate_seconds, seconds_before_reading
from asyncdiff.planner.costs import rates_of
from asyncdiff.profile import time_calls
from asyncdiff.runtime.awaited import AwaitedTensor, Delivery, arrived
from asyncdiff.stage import OutputSpec, output_spec
from asyncdiff.trace import Inputs, find_blocks, flatten_inputs
from asyncdiff.weights.ownership import dense_spec, empty_tensor


@dataclass(frozen=True)
class ExaminedControlNet:
    """`inputs`: of a call. `read_as`: the names of the denoiser's inputs that it makes. `denoiser_inputs`: of
    the denoiser's call after it, those replaced by zeros."""

    module: nn.Module
    examination: Examination
    inputs: Inputs
    read_as: frozenset[str]
    denoiser_inputs: Inputs

    @property
    def output(self) -> OutputSpec:
        return output_spec(self.examination.recording)

    def estimated_seconds(self, device_kind: str) -> float:
        """From its FLOPs and bytes."""
        rates = rates_of(device_kind, str(self.examination.dtype).removeprefix("torch."))
        return rates.seconds(*self.examination.recording.work[0])

    def measured_seconds(self, device: torch.device, threads: int | None) -> float:
        """On the device where it is, with all its weights."""
        whole = self.examination.recording.calls[0].key
        return time_calls(self.module, self.inputs, [whole], device, threads=threads)[whole]

    def before(self, denoiser: Examination) -> Examination:
        """The denoiser's examination, knowing that what the ControlNet makes is new at every step: no stage
        that reads it can go ahead of the call."""
        recording = denoiser.recording
        latents = tuple(dict.fromkeys((*recording.latents, *sorted(self.read_as))))
        return replace(denoiser, recording=replace(recording, latents=latents))

    def cost(
        self, seconds: float, denoiser: Examination, block_seconds: Mapping[BlockKey, float] | None = None
    ) -> ControlNetCost:
        """`seconds`: of a call. `denoiser`: with a part of the batch where groups share it; `block_seconds`
        as `Examination.plan_with` takes them, None for estimates."""
        kind = self.inputs.tensors()[self.inputs.latents].device.type
        dtype = str(denoiser.dtype).removeprefix("torch.")
        graph = find_blocks(denoiser.recording, 1, seconds=block_seconds, cost=rates_of(kind, dtype).seconds)
        return ControlNetCost(
            seconds,
            sum(spec.num_bytes for spec in self.output.tensors),
            seconds_before_reading(graph, estimate_seconds(graph, kind, dtype), self.read_as),
        )


def has_controlnet(pipe: Any) -> bool:
    """Whether it could have a device of its own."""
    try:
        controlnet_of(pipe, tuple(denoisers_of(pipe).values()))
    except ConfigurationError:
        return False
    return True


def examine_controlnet(pipe: Any, call: Mapping[str, Any], *, weights_at_hand: bool) -> ExaminedControlNet:
    """Look at the ControlNet's first call in `pipe(**call)`; `ConfigurationError` where it has none."""
    denoisers = tuple(denoisers_of(pipe).values())
    module = controlnet_of(pipe, denoisers)
    inputs = _plain(flatten_inputs(type(module).forward, *capture_call(pipe, [module], call)))
    examination = examine(module, inputs, weights_at_hand=weights_at_hand)
    output = output_spec(examination.recording)
    with replaced_forward(module, returning(output, inputs)):
        denoiser_call = flatten_inputs(type(denoisers[0]).forward, *capture_call(pipe, denoisers, call))
    read_as = frozenset(
        name for name, leaf in denoiser_call.tensors().items() if isinstance(leaf, AwaitedTensor)
    )
    return ExaminedControlNet(module, examination, inputs, read_as, _plain(denoiser_call))


def returning(output: OutputSpec, inputs: Inputs) -> Callable[..., Any]:
    """A forward that returns tensors nobody computes, which are zeros for whoever looks at them."""
    device = inputs.tensors()[inputs.latents].device

    def zeros() -> list[torch.Tensor]:
        return [empty_tensor(dense_spec(spec), device).zero_() for spec in output.tensors]

    return lambda *args, **kwargs: output.rebuild(Delivery(zeros).tensors(output.tensors, device))


def _plain(inputs: Inputs) -> Inputs:
    return replace(inputs, leaves=tuple(with_values(arrived(leaf)) for leaf in inputs.leaves))

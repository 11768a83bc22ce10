"""A stand-in in which an input has no effect would hide a mistake with that input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from asyncdiff.pipeline.denoiser import capture_call
from asyncdiff.pipeline.run_state import timestep_argument
from asyncdiff.pipeline.timesteps import timestep_name
from asyncdiff.tiny import TINY_PIPELINES, TinyCall, TinyPipeline
from asyncdiff.trace import Inputs, flatten_inputs

FAMILIES = [pytest.param(family, id=name) for name, family in TINY_PIPELINES.items()]


@pytest.mark.parametrize("family", FAMILIES)
def test_timestep_matters(family: TinyPipeline) -> None:
    pipe = family.build()
    denoiser = getattr(pipe, family.denoisers[0])
    args, kwargs = capture_call(pipe, [denoiser], family.arguments(TinyCall()))
    inputs = flatten_inputs(type(denoiser).forward, args, kwargs)
    name, timestep = timestep_name(inputs.names), timestep_argument(inputs)
    predictions = [predict(denoiser, inputs, {name: value}) for value in (timestep, timestep * 0.5 + 0.25)]
    assert (predictions[0] - predictions[1]).abs().max() > 1e-4 * predictions[0].abs().max()


def predict(denoiser: Any, inputs: Inputs, changes: dict[str, Any]) -> torch.Tensor:
    """The first tensor that the denoiser returns for the call with other leaves."""
    with torch.no_grad():
        output = denoiser(**inputs.rebuild(changes))
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output

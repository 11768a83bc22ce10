"""Recorded strides are those of the real forward, also for a single picture."""

from __future__ import annotations

import pytest
import torch
from denoisers import CASES, build
from splitting import inputs_of
from torch import nn

from asyncdiff.trace import record


class Attending(nn.Module):
    """Hands a picture on as an attention layer leaves it, through operators that keep its strides."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.conv = nn.Linear(16, 16), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = sample.shape
        tokens = self.mix(sample.view(batch, channels, height * width).transpose(1, 2))
        picture = tokens.transpose(-1, -2).reshape(batch, channels, height, width)
        picture = (picture + sample) / 1.5
        return self.conv(torch.nn.functional.interpolate(picture, scale_factor=2.0))


def outputs(recording):
    """Of what may have a memory format: pictures and videos."""
    return [
        (call.path, leaf.spec.shape, leaf.spec.stride)
        for call in recording.calls
        for leaf in call.outputs
        if leaf.spec is not None and len(leaf.spec.shape) in (4, 5)
    ]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_picture_from_an_attention_layer(batch, memory_format):
    module = Attending().eval()
    sample = torch.randn(batch, 16, 4, 4).contiguous(memory_format=memory_format)
    inputs = inputs_of(module, {"sample": sample})
    fake, real = (record(module, inputs, device="cpu", live=True, modes=[mode]) for mode in ("fake", "real"))
    assert outputs(fake) == outputs(real)
    assert outputs(real)[0] == ("", (batch, 16, 8, 8), module(sample).stride())


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.mode != "hollow"], ids=lambda case: case.name
)
def test_one_picture(case):
    module = build(case)
    inputs = inputs_of(module, case.inputs(1, 16))
    fake, real = (
        record(module, inputs, device="cpu", live=True, modes=[mode]) for mode in (case.mode, "real")
    )
    assert outputs(fake) == outputs(real)

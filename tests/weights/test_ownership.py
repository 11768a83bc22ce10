"""A tensor's bytes and spec give it back, whatever its strides."""

from __future__ import annotations

import pytest
import torch

from asyncdiff.weights.ownership import bytes_of, dense_spec, tensor_of, tensor_spec


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 6),
        torch.randn(4, 6).t(),
        torch.randn(4, 1).expand(4, 3),
        torch.tensor(999.0).expand(1),  # the timestep of a batch of one
        torch.tensor(999.0).expand(2),
        torch.randn(8)[::2],
        torch.tensor(7),
        torch.zeros(0, 3),
        torch.randn(3).bfloat16(),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tuple(tensor.stride())}",
)
def test_bytes_and_spec_give_a_tensor_back(tensor: torch.Tensor) -> None:
    spec = tensor_spec(tensor)
    again = tensor_of(spec, bytes_of(tensor))
    assert torch.equal(again, tensor)
    assert tensor_spec(again) == dense_spec(spec)

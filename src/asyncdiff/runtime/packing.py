"""Tensors as flat pieces of memory: what every backend sends and receives."""

from __future__ import annotations

import math

import torch

from asyncdiff.graph import TensorSpec
from asyncdiff.weights.ownership import dense_spec, empty_tensor, tensor_spec


def as_sendable(tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The tensor's elements as a flat tensor in the memory order that the receiver expects."""
    if tensor.is_contiguous() and tensor_spec(tensor) == spec:
        return tensor.detach().view(-1)
    if tuple(tensor.shape) != spec.shape or str(tensor.dtype) != f"torch.{spec.dtype}":
        raise ValueError(f"a tensor of {tensor_spec(tensor)} was about to be sent where {spec} is expected")
    dense, expected = tensor.detach(), dense_spec(spec)
    if tuple(dense.stride()) != expected.stride:
        dense = empty_tensor(expected, dense.device).copy_(dense)
    return dense.as_strided((dense.numel(),), (1,), dense.storage_offset())


def receive_buffer(
    spec: TensorSpec, device: torch.device, *, pinned: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of this spec and the flat view of its memory to receive into."""
    dense = dense_spec(spec)
    flat = torch.empty(
        math.prod(dense.shape), dtype=getattr(torch, dense.dtype), device=device, pin_memory=pinned
    )
    return flat.as_strided(dense.shape, dense.stride), flat

"""Which tensors a module holds, freeing some of them, filling others."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache

import torch
from torch import nn

from asyncdiff.graph import TensorSpec
from asyncdiff.weights.quantised import PART, dressed_like, named_parts, recomposed


def tensor_spec(tensor: torch.Tensor) -> TensorSpec:
    """Shape, stride and dtype of a live tensor."""
    return TensorSpec(tuple(tensor.shape), tuple(tensor.stride()), str(tensor.dtype).removeprefix("torch."))


def empty_tensor(spec: TensorSpec, device: torch.device | str) -> torch.Tensor:
    """Uninitialised memory of this spec."""
    return torch.empty_strided(spec.shape, spec.stride, dtype=getattr(torch, spec.dtype), device=device)


@lru_cache(maxsize=4096)
def dense_spec(spec: TensorSpec) -> TensorSpec:
    """The spec of a copy: the same strides where they fill a piece of memory without gaps, else row-major
    ones.
    """
    expected = 1
    for stride, size in sorted(zip(spec.stride, spec.shape, strict=True)):
        if size != 1 and stride != expected:
            return TensorSpec(spec.shape, tuple(torch.empty(spec.shape, device="meta").stride()), spec.dtype)
        expected *= size
    return spec


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The elements of a CPU tensor in logical (row-major) order."""
    dense = tensor.detach().contiguous()
    return ctypes.string_at(dense.data_ptr(), dense.nbytes)  # numpy has no bfloat16


def tensor_of(spec: TensorSpec, data: bytes) -> torch.Tensor:
    """A CPU tensor with these elements, in the memory order of the spec."""
    made = empty_tensor(dense_spec(spec), "cpu")
    if data:
        made.copy_(torch.frombuffer(bytearray(data), dtype=made.dtype).view(spec.shape))
    return made


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every registered parameter and buffer by dotted name: tied ones under each of their names, composed
    ones by their parts."""
    for name, tensor in module.named_parameters(remove_duplicate=False):
        yield from named_parts(name, tensor)
    yield from module.named_buffers(remove_duplicate=False)


def free_tensors(module: nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Move the named tensors to the meta device and return the freed ones by name.

    The first parameter of the module keeps a one-element stand-in on its device, so that `module.device`
    answers as before; it says nothing about the values.
    """
    first = next((name for name, _ in module.named_parameters()), None)
    freed: dict[str, torch.Tensor] = {}
    stand_ins: dict[str, torch.Tensor] = {}
    for name, tensor in named_tensors(module):
        if name in names:
            freed[name] = tensor
            is_first = name.split(PART)[0] == first
            stand_ins[name] = stand_in(tensor_spec(tensor), tensor.device if is_first else None)
    assign_tensors(module, stand_ins)
    return freed


def assign_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put tensors in the place of the registered ones of the same name, as parameters where those were."""
    for name, tensor in tensors.items():
        owner_path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(owner_path)
        attribute, _, part = attribute.partition(PART)
        if part:
            owner._parameters[attribute] = recomposed(owner.get_parameter(attribute), {part: tensor})
        elif attribute in owner._parameters:
            old = owner._parameters[attribute]
            tensor = dressed_like(tensor, old)
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=old is not None and old.requires_grad)
            owner._parameters[attribute] = tensor
        else:
            owner._buffers[attribute] = tensor


def resident_bytes(module: nn.Module) -> int:
    """Bytes of the distinct storages that the module's tensors really hold (meta ones hold none)."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for _, tensor in named_tensors(module)
        if tensor.device.type != "meta"
    }
    return sum(storages.values())


def stand_in(spec: TensorSpec, device: torch.device | str | None) -> torch.Tensor:
    """A tensor of this shape and dtype without values: on the meta device, or one element on `device`."""
    dtype = getattr(torch, spec.dtype)
    if device is None:
        return torch.empty_strided(spec.shape, spec.stride, dtype=dtype, device="meta")
    return torch.zeros((), dtype=dtype, device=device).expand(spec.shape)

"""Parameters that are more than their elements: quantised ones.

Two kinds. GGUF (diffusers) and bitsandbytes *dress* a tensor: a subclass of Parameter over the elements, with
attributes that say how to read them. torchao *composes* several tensors to one that has none itself
(`__tensor_flatten__`). What travels are plain tensors; their dress or composition travels with the skeleton.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

PART = "#"
"""Between the name of a composed parameter and that of a part of it: `proj.weight#scale`."""


class _Self(enum.Enum):
    """In the place of an attribute that is the tensor's own elements (bitsandbytes' `CB`)."""

    ELEMENTS = enum.auto()


def parts_of(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that a composed one is made of; none for any other."""
    if not hasattr(tensor, "__tensor_flatten__") or not isinstance(tensor, nn.Parameter):
        return {}
    composed: Any = tensor
    return {name: getattr(composed, name) for name in composed.__tensor_flatten__()[0]}


def named_parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor by its name, or its parts by theirs."""
    parts = parts_of(tensor)
    if not parts:
        yield name, tensor
    for part, inner in parts.items():
        yield f"{name}{PART}{part}", inner


def recomposed(old: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> nn.Parameter:
    """A composed parameter with some of its parts replaced."""
    names, context = old.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = {name: parts.get(name, getattr(old, name)) for name in names}
    return compose(type(old), inner, context, tuple(old.shape), tuple(old.stride()), old.requires_grad)


def compose(
    kind: Any,
    parts: Mapping[str, torch.Tensor],
    context: Any,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
) -> nn.Parameter:
    """A composed parameter of its parts."""
    return nn.Parameter(kind.__tensor_unflatten__(dict(parts), context, shape, stride), requires_grad)


def is_dressed(tensor: torch.Tensor) -> bool:
    """Whether it is a parameter of a class of its own over plain elements."""
    kind = type(tensor)  # not isinstance: a fake tensor may say that it is a parameter
    return issubclass(kind, nn.Parameter) and kind is not nn.Parameter and not parts_of(tensor)


def undressed(tensor: torch.Tensor) -> torch.Tensor:
    """The plain elements."""
    return torch.Tensor._make_subclass(torch.Tensor, tensor) if is_dressed(tensor) else tensor


def dressing(tensor: torch.Tensor) -> dict[str, Any]:
    """The attributes of a dressed parameter, without another copy of its elements."""
    return {
        name: _Self.ELEMENTS if isinstance(value, torch.Tensor) and _is_same(value, tensor) else value
        for name, value in vars(tensor).items()
    }


def dressed(
    kind: Any, tensor: torch.Tensor, requires_grad: bool, attributes: Mapping[str, Any]
) -> torch.Tensor:
    """A parameter of this class over these elements; as it is if it is one already."""
    if type(tensor) is kind:
        return tensor
    elements = tensor.detach()
    made: torch.Tensor = torch.Tensor._make_subclass(kind, elements, requires_grad)
    for name, value in attributes.items():
        setattr(made, name, elements if value is _Self.ELEMENTS else value)
    return made


def dressed_like(tensor: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
    """A tensor that takes the place of another one, with its dress if it has one."""
    if old is None or not is_dressed(old):
        return tensor
    return dressed(type(old), undressed(tensor), old.requires_grad, dressing(old))


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.device.type != "meta" and a.data_ptr() == b.data_ptr()

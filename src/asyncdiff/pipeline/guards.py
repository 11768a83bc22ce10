"""What cannot be done to a pipeline while its denoiser is divided over devices: refused by name.

Instance attributes that shadow the methods; `remove` takes them out again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asyncdiff.errors import ParallelizedError

_DENOISER_METHODS = (
    "add_adapter",
    "cpu",
    "cuda",
    "delete_adapters",
    "double",
    "enable_group_offload",
    "enable_parallelism",
    "float",
    "fuse_lora",
    "half",
    "load_lora_adapter",
    "load_state_dict",
    "save_lora_adapter",
    "save_pretrained",
    "state_dict",
    "unfuse_lora",
    "unload_lora",
)
_PIPELINE_METHODS = (
    "delete_adapters",
    "enable_group_offload",
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "fuse_lora",
    "load_ip_adapter",
    "load_lora_weights",
    "save_pretrained",
    "unfuse_lora",
    "unload_ip_adapter",
    "unload_lora_weights",
)


@dataclass(frozen=True)
class Refusal:
    """Stands in for a method that would see only this process's share of the weights."""

    owner: str
    method: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ParallelizedError(
            f"{self.owner}.{self.method}() is not possible while the denoiser is divided over devices. Call "
            f"handle.remove() first, then {self.method}(), then parallelize again."
        )


@dataclass(frozen=True)
class RefuseOtherDevice:
    """Stands in for `to`: everything but staying where it is, as it is, is refused.

    `move`: what to call where nothing changes for the denoiser (a pipeline's other components may still
    move).
    """

    owner: Any
    device: torch.device
    dtype: torch.dtype
    move: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        where = {name: value for name, value in kwargs.items() if name != "silence_dtype_warnings"}
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **where)
        if not (device is None or _is_same(device, self.device)) or dtype not in (None, self.dtype):
            raise ParallelizedError(
                f"{type(self.owner).__name__}.to({device or dtype}) is not possible while the denoiser is "
                f"divided over devices: it stays on {self.device} in {self.dtype}. Call handle.remove() "
                "first. (from_pipe casts to float32 unless it is given torch_dtype.)"
            )
        return self.owner if self.move is None else self.move(self.owner, *args, **kwargs)


def install_guards(pipe: Any, denoiser: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Shadow the methods of this denoiser and this pipeline that would see only a part of the weights.

    The pipeline's own `to` too, because it moves the other components before it comes to the denoiser.
    """
    vars(denoiser)["to"] = RefuseOtherDevice(denoiser, device, dtype)
    if hasattr(type(pipe), "to"):
        vars(pipe)["to"] = RefuseOtherDevice(pipe, device, dtype, move=type(pipe).to)
    for owner, names in ((denoiser, _DENOISER_METHODS), (pipe, _PIPELINE_METHODS)):
        for name in names:
            if hasattr(type(owner), name):
                vars(owner)[name] = Refusal(type(owner).__name__, name)


def remove_guards(pipe: Any, denoiser: nn.Module) -> None:
    """Take them out again; no error where they are not in."""
    for owner in (denoiser, pipe):
        for name, value in list(vars(owner).items()):
            if isinstance(value, Refusal | RefuseOtherDevice):
                del vars(owner)[name]


def _is_same(a: torch.device, b: torch.device) -> bool:
    return (a.type, a.index or 0) == (b.type, b.index or 0)


def guard_names() -> tuple[str, ...]:
    """The attributes that guards add to a denoiser."""
    return ("to", *_DENOISER_METHODS)

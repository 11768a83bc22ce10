"""What is combined with a denoiser that is divided over devices: followed, or refused by name.

`refuse_other_ways` is for what is there already. While the denoiser is divided, methods are guarded by
instance attributes that shadow them; `remove` takes them out again. Three kinds: methods that need or change
weights (LoRA, IP-Adapter) get all of them back for the moment; methods that change how the denoiser computes
are noted, so that the next call follows; what cannot work is refused with the way out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from asyncdiff.errors import ConfigurationError, ParallelizedError
from asyncdiff.weights.attachments import hook_registry

_NEED_ALL_WEIGHTS = (
    "add_adapter",
    "delete_adapters",
    "fuse_lora",
    "fuse_qkv_projections",
    "load_ip_adapter",
    "load_lora_adapter",
    "load_lora_weights",
    "save_lora_adapter",
    "set_lora_device",
    "unfuse_lora",
    "unfuse_qkv_projections",
    "unload_ip_adapter",
    "unload_lora",
    "unload_lora_weights",
    "_load_ip_adapter_weights",
)
_CHANGE_HOW_IT_COMPUTES = (
    "compile_repeated_blocks",
    "disable_adapters",
    "disable_forward_chunking",
    "disable_freeu",
    "disable_lora",
    "disable_xformers_memory_efficient_attention",
    "enable_adapters",
    "enable_forward_chunking",
    "enable_freeu",
    "enable_lora",
    "enable_xformers_memory_efficient_attention",
    "reset_attention_backend",
    "set_adapter",
    "set_adapters",
    "set_attention_backend",
    "set_attention_slice",
    "set_attn_processor",
    "set_default_attn_processor",
    "set_ip_adapter_scale",
)
_PART_OF_THE_WEIGHTS = "this process holds only a part of the weights. Call handle.remove() first."
_OFFLOADING = (
    "every device already holds only the weights of its own stage, and offloading would move them away. "
    "Leave it out (text encoders and VAE may be moved with their own .to()), or call handle.remove() first."
)
_CACHE = (
    "it skips blocks by what earlier blocks returned, which the devices do not wait for. Do without the "
    "cache, or call handle.remove() first."
)
_REFUSED = {
    "cpu": _PART_OF_THE_WEIGHTS,
    "cuda": _PART_OF_THE_WEIGHTS,
    "double": _PART_OF_THE_WEIGHTS,
    "float": _PART_OF_THE_WEIGHTS,
    "half": _PART_OF_THE_WEIGHTS,
    "load_state_dict": _PART_OF_THE_WEIGHTS,
    "save_pretrained": _PART_OF_THE_WEIGHTS,
    "state_dict": _PART_OF_THE_WEIGHTS,
    "enable_group_offload": _OFFLOADING,
    "enable_model_cpu_offload": _OFFLOADING,
    "enable_sequential_cpu_offload": _OFFLOADING,
    "enable_cache": _CACHE,
    "enable_layerwise_casting": (
        "it casts the weights. Call handle.remove() first, then cast, then parallelize again."
    ),
    "enable_parallelism": (
        "two ways of dividing it cannot be combined. Call handle.remove() first to use the other one."
    ),
    "compile": (
        "compiled as a whole it would run past the devices. Compile its blocks instead "
        "(compile_repeated_blocks()), or call handle.remove() first."
    ),
}


class Divided(Protocol):
    """What guards need to know of what is divided: a denoiser, or all denoisers of a pipeline."""

    def whole_weights(self) -> AbstractContextManager[None]:
        """All weights in this process and no guards, until the end; after that they are divided again."""

    def note_change(self) -> None:
        """The denoiser computes in another way from the next call on."""


@dataclass(frozen=True)
class Refusal:
    """Stands in for a method that cannot work."""

    owner: str
    method: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ParallelizedError(
            f"{self.owner}.{self.method}() is not possible while the denoiser is divided over devices: "
            f"{_REFUSED[self.method]}"
        )


@dataclass(frozen=True)
class WithWholeWeights:
    """Stands in for a method that needs or changes weights."""

    owner: Any
    method: str
    divided: Divided

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.divided.whole_weights():
            return getattr(self.owner, self.method)(*args, **kwargs)


@dataclass(frozen=True)
class Followed:
    """Stands in for a method that changes how the denoiser computes, perhaps in the middle of a run."""

    owner: Any
    method: str
    divided: Divided

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(type(self.owner), self.method)(self.owner, *args, **kwargs)
        finally:
            self.divided.note_change()


@dataclass(frozen=True)
class RefuseOtherDevice:
    """Stands in for `to`: another device or dtype is refused; another memory format is not.

    `move`: what to call where nothing changes for the denoiser (a pipeline's other components may still
    move).
    """

    owner: Any
    device: torch.device
    dtype: torch.dtype
    divided: Divided
    move: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        where = {name: value for name, value in kwargs.items() if name != "silence_dtype_warnings"}
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **where)
        if not (device is None or _is_same(device, self.device)) or dtype not in (None, self.dtype):
            raise ParallelizedError(
                f"{type(self.owner).__name__}.to({device or dtype}) is not possible while the denoiser is "
                f"divided over devices: it stays on {self.device} in {self.dtype}. Call handle.remove() "
                "first. (from_pipe casts to float32 unless it is given torch_dtype.)"
            )
        if self.move is not None:
            return self.move(self.owner, *args, **kwargs)
        if memory_format is not None:
            with self.divided.whole_weights():
                self.owner.to(*args, **kwargs)
        return self.owner


def refuse_other_ways(denoiser: nn.Module) -> None:
    """`ConfigurationError` where the denoiser is divided in another way already, or a cache skips blocks."""
    name = type(denoiser).__name__
    if isinstance(denoiser, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ConfigurationError(
            f"The denoiser is wrapped in {name}. Give the pipeline the model itself (its .module)."
        )
    is_sharded = any(type(tensor).__name__ == "DTensor" for tensor in denoiser.parameters())
    if getattr(denoiser, "_parallel_config", None) is not None or is_sharded:
        raise ConfigurationError(
            f"{name} is divided over devices in another way already (enable_parallelism(), parallel_config "
            "or sharded weights). The two cannot be combined: load it without, or do without asyncdiff."
        )
    caches = {type(hook).__name__ for module in denoiser.modules() for hook in _stateful_hooks(module)}
    if getattr(denoiser, "_cache_config", None) is not None or caches:
        raise ConfigurationError(
            f"{name} has a cache enabled ({', '.join(sorted(caches)) or 'enable_cache()'}), which skips "
            "blocks by what earlier blocks returned, and the devices do not wait for that. Call its "
            "disable_cache() first."
        )


def _stateful_hooks(module: nn.Module) -> list[Any]:
    """Hooks of diffusers that remember something from one call to the next: its caches."""
    registry = hook_registry(module)
    return [] if registry is None else [hook for hook in registry.hooks.values() if hook._is_stateful]


_GUARDS = (Refusal, RefuseOtherDevice, WithWholeWeights, Followed)


def install_guards(owner: Any, device: torch.device, dtype: torch.dtype, divided: Divided) -> None:
    """Shadow the methods of a denoiser, or of a pipeline, that weights elsewhere make a difference to.

    A pipeline's own `to` too, because it moves the other components before it comes to the denoiser.
    """
    guards: dict[str, Any] = {name: Refusal(type(owner).__name__, name) for name in _REFUSED}
    guards |= {name: WithWholeWeights(owner, name, divided) for name in _NEED_ALL_WEIGHTS}
    guards |= {name: Followed(owner, name, divided) for name in _CHANGE_HOW_IT_COMPUTES}
    move = None if isinstance(owner, nn.Module) else getattr(type(owner), "to", None)
    guards["to"] = RefuseOtherDevice(owner, device, dtype, divided, move)
    vars(owner).update({name: guard for name, guard in guards.items() if hasattr(type(owner), name)})


def remove_guards(owner: Any) -> None:
    """Take them out again; no error where they are not in."""
    for name, value in list(vars(owner).items()):
        if isinstance(value, _GUARDS):
            del vars(owner)[name]


def _is_same(a: torch.device, b: torch.device) -> bool:
    return (a.type, a.index or 0) == (b.type, b.index or 0)


def guard_names() -> tuple[str, ...]:
    """The attributes that guards add to a denoiser."""
    return ("to", *_REFUSED, *_NEED_ALL_WEIGHTS, *_CHANGE_HOW_IT_COMPUTES)

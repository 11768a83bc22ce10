"""How fast the devices are, relative to the driver's: measured where they are of different kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from asyncdiff.graph import BlockKey
from asyncdiff.profile.calls import time_calls
from asyncdiff.trace import Inputs
from asyncdiff.weights import Skeleton, load_skeleton, named_tensors

_WHOLE = BlockKey("", 0)


def relative_speeds(
    denoiser: nn.Module, skeleton: Skeleton, inputs: Inputs, devices: Sequence[str], threads: int | None
) -> tuple[float, ...] | None:
    """One speed per device, 1.0 for the first, on which the denoiser is; None where all are of one kind.

    Each kind of device that is not the first one's times a forward of the whole denoiser, of which it gets a
    copy for as long as that takes. CPU devices are one kind: what part of the cores each process will get is
    not to be seen from here, so state it.
    """
    kinds = [_kind(torch.device(name)) for name in devices]
    if len(set(kinds)) == 1:
        return None
    seconds = {kinds[0]: _forward_seconds(denoiser, inputs, torch.device(devices[0]), threads)}
    for name, kind in zip(devices, kinds, strict=True):
        if kind not in seconds:
            device = torch.device(name)
            tensors = {key: tensor.to(device) for key, tensor in named_tensors(denoiser)}
            copy = load_skeleton(skeleton, tensors, device)
            seconds[kind] = _forward_seconds(copy, _moved(inputs, device), device, threads)
            del copy, tensors
    return tuple(seconds[kinds[0]] / seconds[kind] for kind in kinds)


def _kind(device: torch.device) -> str:
    """What is equally fast."""
    if device.type in ("cuda", "xpu"):
        return str(getattr(torch, device.type).get_device_properties(device).name)
    return device.type


def _forward_seconds(module: nn.Module, inputs: Inputs, device: torch.device, threads: int | None) -> float:
    return time_calls(module, inputs, [_WHOLE], device, threads=threads)[_WHOLE]


def _moved(inputs: Inputs, device: torch.device) -> Inputs:
    def move(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf

    return replace(inputs, leaves=tuple(map(move, inputs.leaves)))

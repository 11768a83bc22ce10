"""Weights that can be read again from the file they came from.

A tensor's identity with the file is never assumed: a checksum is taken when it leaves the driver and compared
when it is read back, so a fused LoRA or a cast that changed values is noticed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from asyncdiff.weights.ownership import bytes_of

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of one model folder."""

    files: tuple[Path, ...]

    def read(self, name: str) -> torch.Tensor | None:
        """The tensor of this name as the file has it, or None where no file has it."""
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    return file.get_tensor(name)
        return None

    def read_like(self, name: str, like: torch.Tensor, expected_checksum: int) -> torch.Tensor | None:
        """The tensor cast and moved as `like` was, or None unless its values are those that were freed."""
        tensor = self.read(name)
        if tensor is None or tensor.shape != like.shape:
            return None
        tensor = tensor.to(dtype=like.dtype)
        return tensor if checksum([tensor]) == expected_checksum else None


def find_checkpoint(module: nn.Module) -> Checkpoint | None:
    """The files that a diffusers model was loaded from, where its config still names a local folder."""
    source = getattr(getattr(module, "config", None), "_name_or_path", None)
    if not source or not Path(source).is_dir():
        return None
    files = tuple(sorted(Path(source).glob("*.safetensors")))
    return Checkpoint(files) if files else None


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """A 32-bit checksum of the tensors' bytes in row-major order, whatever their device and strides.

    Copied to the host in chunks of a few MB.
    """
    value = 0
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        for start in range(0, flat.numel(), _CHUNK_ELEMENTS):
            value = zlib.crc32(bytes_of(flat[start : start + _CHUNK_ELEMENTS].cpu()), value)
    return value

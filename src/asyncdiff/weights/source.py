"""Weights that can be read again from the file they came from.

A tensor's identity with the file is never assumed: a checksum is taken when it leaves the driver and compared
when it is read back, so a fused LoRA or a cast that changed values is noticed. A tensor that was
never in memory (`Unloaded`) is what the file says.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from asyncdiff.graph import TensorSpec
from asyncdiff.weights.ownership import assign_tensors, bytes_of, named_tensors, tensor_spec

_CHUNK_ELEMENTS = 1 << 22
_MAPPED_BYTES = 1 << 26


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of one model."""

    files: tuple[Path, ...]

    @cached_property
    def homes(self) -> dict[str, Path]:
        """Which file has the tensor of a name."""
        found: dict[str, Path] = {}
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    def read(self, specs: Mapping[str, TensorSpec], device: torch.device) -> dict[str, torch.Tensor]:
        """The named tensors, cast, in memory of their own on `device`.

        Little more than these is ever in memory, and nothing of the files stays mapped. KeyError for a name
        that no file has, ValueError for another shape.
        """
        read: dict[str, torch.Tensor] = {}
        for path, names in self._readings(specs):
            with safe_open(path, framework="pt") as file:
                for name in names:
                    tensor = file.get_tensor(name)
                    if tuple(tensor.shape) != specs[name].shape:
                        raise ValueError(
                            f"{path} has {name} in shape {tuple(tensor.shape)}, not {specs[name].shape}"
                        )
                    read[name] = tensor.to(device, getattr(torch, specs[name].dtype), copy=True)
        return read

    def _readings(self, specs: Mapping[str, TensorSpec]) -> Iterator[tuple[Path, list[str]]]:
        """Which names to read of which file at a time.

        What has been touched of a mapped file counts as this process's memory until it is closed: read at
        once, a stage in bfloat16 took three times its size from a float32 file.
        """
        by_file: dict[Path, list[str]] = {}
        for name in specs:
            by_file.setdefault(self.homes[name], []).append(name)
        for path, names in by_file.items():
            size, start = 0, 0
            for end, name in enumerate(names, start=1):
                size += specs[name].num_bytes
                if size >= _MAPPED_BYTES or end == len(names):
                    yield path, names[start:end]
                    size, start = 0, end

    def read_like(self, name: str, like: torch.Tensor, expected_checksum: int) -> torch.Tensor | None:
        """The tensor cast and moved as `like` was, or None unless its values are those that were freed."""
        try:
            tensor = self.read({name: tensor_spec(like)}, torch.device("cpu"))[name]
        except (KeyError, ValueError):
            return None
        return tensor if checksum([tensor]) == expected_checksum else None


@dataclass(frozen=True)
class Unloaded:
    """Tensors of a module that are in no process's memory yet, and the files that have them."""

    checkpoint: Checkpoint
    names: frozenset[str]


def read_unloaded(
    module: nn.Module, unloaded: Unloaded, device: torch.device, names: Collection[str] | None = None
) -> set[str]:
    """Read the unloaded ones of `names` (None: of all) into the module; which they are."""
    wanted = unloaded.names if names is None else unloaded.names.intersection(names)
    specs = {name: tensor_spec(tensor) for name, tensor in named_tensors(module) if name in wanted}
    assign_tensors(module, unloaded.checkpoint.read(specs, device))
    return set(specs)


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

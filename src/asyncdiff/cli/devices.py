"""Which devices of this machine the command line means. Imports torch when asked."""

from __future__ import annotations

from asyncdiff.bench.environment import usable_cores
from asyncdiff.errors import ConfigurationError


def resolve_devices(asked: int | tuple[str, ...] | None) -> list[str]:
    """The names of the devices to use; `ConfigurationError` if one of them is not there.

    None: the first two CUDA devices where there are two, else two shares of the CPU. A number: that many CUDA
    devices, or where there is none that many shares of the CPU.
    """
    if asked is None:
        return _first(2) if _count("cuda") >= 2 else ["cpu", "cpu"]
    if isinstance(asked, int):
        return _first(asked)
    return [_existing(name) for name in asked]


def _first(count: int) -> list[str]:
    num_cuda = _count("cuda")
    if num_cuda >= count:
        return [f"cuda:{i}" for i in range(count)]
    if num_cuda:
        raise ConfigurationError(
            f"--devices {count}: this machine has {num_cuda} CUDA device{'s' * (num_cuda > 1)}. "
            f"Name them to share: --devices {','.join(['cuda:0'] * count)}, or use the CPU: "
            f"--devices {','.join(['cpu'] * count)}."
        )
    num_cores = usable_cores()
    if count > num_cores:
        raise ConfigurationError(
            f"--devices {count}: this machine has no CUDA device and {num_cores} CPU cores. "
            f"Use --devices {num_cores} or fewer, or name them to share cores: {','.join(['cpu'] * count)}."
        )
    return ["cpu"] * count


def _existing(name: str) -> str:
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return name
    available = _count(kind)
    if int(index or 0) >= available:
        there = f"has {available} (0 to {available - 1})" if available else "has none"
        raise ConfigurationError(f"--devices {name}: this machine {there} of {kind}; see `asyncdiff doctor`.")
    return name if kind == "mps" else f"{kind}:{index or 0}"


def _count(kind: str) -> int:
    import torch

    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return int({"cuda": torch.cuda, "xpu": torch.xpu}[kind].device_count())

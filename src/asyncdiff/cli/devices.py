"""Which devices of this machine the command line means. Imports torch when asked."""

from __future__ import annotations

from asyncdiff.errors import ConfigurationError


def resolve_devices(asked: int | tuple[str, ...] | None) -> list[str]:
    """The names of the devices to use; `ConfigurationError` if one of them is not there.

    None: the first two CUDA devices where there are two, else two shares of the CPU. A number: that many CUDA
    devices, or where there is none that many shares of the CPU.
    """
    import torch

    from asyncdiff.config import available_cores
    from asyncdiff.pipeline.devices import parse_devices

    num_cuda = torch.cuda.device_count()
    if asked is None:
        return ["cuda:0", "cuda:1"] if num_cuda >= 2 else ["cpu", "cpu"]
    if isinstance(asked, int) and not num_cuda and asked > available_cores():
        raise ConfigurationError(
            f"--devices {asked}: this machine has no CUDA device and {available_cores()} CPU cores. "
            f"Use --devices {available_cores()} or fewer, or name devices that share cores: cpu,cpu,cpu."
        )
    return list(parse_devices(asked, torch.device("cuda:0" if num_cuda else "cpu")))

"""Which devices, which runtime: settled and checked before anything starts."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import psutil
import torch

from asyncdiff.config import available_cores, can_split, check_controlnet, settle, settle_groups
from asyncdiff.errors import ConfigurationError

RUNTIMES = ("auto", "local", "spawn", "torchrun")
_WEIGHTS_SHARE = 0.8  # of a device's memory; the rest is for activations and what else the pipeline has


@dataclass(frozen=True)
class Placement:
    """`runtime`: one of `RUNTIMES` but "auto". `devices`: one per rank, a single one for "local".

    `num_stages`: of each of `groups` groups. `split_stages`: what `num_stages` would be with two groups,
    where that is still to be decided; else None. `controlnet_device`: of a ControlNet that has one to
    itself, which is none of `devices`; None on "local".
    """

    runtime: str
    devices: tuple[str, ...]
    num_stages: int
    groups: int = 1
    split_stages: int | None = None
    controlnet_device: str | None = None

    @property
    def all_devices(self) -> tuple[str, ...]:
        """With the ControlNet's, which is the last."""
        return self.devices if self.controlnet_device is None else (*self.devices, self.controlnet_device)

    @property
    def threads_per_device(self) -> int | None:
        """Intra-op threads per worker where CPU workers share the cores of a host; None: leave as it is."""
        cpu_workers = sum(torch.device(device).type == "cpu" for device in self.all_devices)
        if self.runtime == "local" or cpu_workers < 2:
            return None
        return max(1, available_cores() // cpu_workers)


def settle_placement(
    devices: int | Sequence[str] | None,
    num_stages: int | None,
    stride: int,
    runtime: str,
    denoiser_device: torch.device,
    guidance: str = "together",
    controlnet: str = "serial",
) -> Placement:
    """What was asked for as a `Placement`; `ConfigurationError` for what this machine cannot do."""
    check_controlnet(controlnet)
    if controlnet != "serial":
        return _placement_with_controlnet(
            devices, num_stages, stride, runtime, denoiser_device, guidance, controlnet
        )
    if runtime not in RUNTIMES:
        raise ConfigurationError(f"runtime must be one of {', '.join(RUNTIMES)}, but {runtime!r} was given.")
    if runtime == "torchrun" or (runtime == "auto" and _is_under_torchrun()):
        return _torchrun_placement(devices, num_stages, stride, denoiser_device, guidance)
    if runtime == "local" or (devices is None and num_stages is not None and runtime == "auto"):
        return _local_placement(devices, num_stages, stride, denoiser_device, guidance)
    names = parse_devices(devices, denoiser_device)
    if len(names) == 1 and runtime == "auto":
        runtime = "local"
    else:
        _check_driver_device(names[0], denoiser_device)
        runtime = "spawn"
    return _placement(runtime, names, len(names), num_stages, stride, guidance)


def _placement_with_controlnet(
    devices: int | Sequence[str] | None,
    num_stages: int | None,
    stride: int,
    runtime: str,
    denoiser_device: torch.device,
    guidance: str,
    controlnet: str,
) -> Placement:
    """The last device is the ControlNet's, the others are as they would be without it."""
    if runtime == "torchrun" or (runtime == "auto" and _is_under_torchrun()):
        raise ConfigurationError(
            f'controlnet="{controlnet}" is not possible with the processes of torchrun. Start the script '
            'without torchrun, with devices=[...], or use controlnet="serial".'
        )
    if devices is None and (runtime == "local" or num_stages is not None):
        return settle_placement(None, num_stages, stride, runtime, denoiser_device, guidance)
    names = parse_devices(devices, denoiser_device)
    if len(names) < 2:
        raise ConfigurationError(
            f'controlnet="{controlnet}" gives the last device to the ControlNet and the others to the '
            f"denoiser, but {names[0]} is the only one that was given. Pass at least 2, or use "
            'controlnet="serial".'
        )
    if runtime == "local":
        return settle_placement(len(names) - 1, num_stages, stride, runtime, denoiser_device, guidance)
    placement = settle_placement(names[:-1], num_stages, stride, "spawn", denoiser_device, guidance)
    return replace(placement, controlnet_device=names[-1])


def _placement(
    runtime: str,
    names: tuple[str, ...],
    num_devices: int | None,
    num_stages: int | None,
    stride: int,
    guidance: str,
) -> Placement:
    """`num_devices`: how many there are, or would be where one runs all stages in turn."""
    groups = settle_groups(num_devices, num_stages, stride, guidance)
    of_group = None if num_devices is None else num_devices // groups
    stages, _ = settle(of_group, num_stages, stride)
    if not can_split(num_devices, num_stages, stride, guidance):
        return Placement(runtime, names, stages, groups)
    assert num_devices is not None
    return Placement(runtime, names, stages, groups, settle(num_devices // 2, None, stride)[0])


def parse_devices(devices: int | Sequence[str] | None, denoiser_device: torch.device) -> tuple[str, ...]:
    """Device names, each checked to exist. A number takes that many of the denoiser's kind."""
    if devices is None:
        count = torch.cuda.device_count() if denoiser_device.type == "cuda" else 0
        if count < 2:
            raise ConfigurationError(
                "No devices were given and there are fewer than two GPUs to choose. Pass devices=[...], for "
                'example devices=["cpu", "cpu"], or num_stages=2 alone to run all stages in this process.'
            )
        devices = count
    if isinstance(devices, bool) or not isinstance(devices, int | Sequence):
        raise ConfigurationError(f"devices must be a number or a list of names, but {devices!r} was given.")
    if isinstance(devices, int):
        devices = _count_of_devices(devices, denoiser_device)
    if isinstance(devices, str):
        devices = devices.split(",")
    if not devices:
        raise ConfigurationError("devices is empty. Pass at least one.")
    return tuple(_check_device(name) for name in devices)


def _count_of_devices(count: int, denoiser_device: torch.device) -> list[str]:
    if count < 1:
        raise ConfigurationError(f"devices={count} was given, but at least one is needed.")
    if denoiser_device.type != "cuda":
        return [denoiser_device.type] * count
    if count > torch.cuda.device_count():
        raise ConfigurationError(
            f"devices={count} was given, but this machine has {torch.cuda.device_count()} CUDA devices. Use "
            f"devices={torch.cuda.device_count()} or less."
        )
    first = denoiser_device.index or 0
    others = [index for index in range(torch.cuda.device_count()) if index != first]
    return [f"cuda:{index}" for index in [first, *others][:count]]


def _check_device(name: str) -> str:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f"{name!r} is not a device. Use names such as 'cpu', 'cuda:0' or 'cuda:1'."
        ) from error
    if device.type == "cuda":
        index = device.index or 0
        if index >= torch.cuda.device_count():
            raise ConfigurationError(
                f"{name!r} was given, but this machine has {torch.cuda.device_count()} CUDA devices."
            )
        return f"cuda:{index}"
    if device.type not in ("cpu", "xpu", "mps"):
        raise ConfigurationError(f"{name!r} was given, but stages run on cpu, cuda, xpu or mps devices.")
    if device.type != "cpu" and not getattr(torch, device.type).is_available():
        raise ConfigurationError(f"{name!r} was given, but torch finds no {device.type} device here.")
    return str(device)


def have_room(devices: Sequence[str], weight_bytes: float) -> bool:
    """Whether each device can hold so many bytes of weights, as far as this machine can tell: CPU devices and
    workers that share a GPU share its memory."""
    counts = Counter("cpu" if torch.device(name).type == "cpu" else name for name in devices)
    return all(count * weight_bytes <= _WEIGHTS_SHARE * _memory_bytes(name) for name, count in counts.items())


def _memory_bytes(name: str) -> float:
    device = torch.device(name)
    if device.type == "cpu":
        return float(psutil.virtual_memory().total)
    if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
        return float(torch.cuda.get_device_properties(device).total_memory)
    return math.inf


def _check_driver_device(first: str, denoiser_device: torch.device) -> None:
    device = torch.device(first)
    if device.type != denoiser_device.type or (device.index or 0) != (denoiser_device.index or 0):
        raise ConfigurationError(
            f"The first device is {first}, but the denoiser is on {denoiser_device}. The first device is the "
            f'driver\'s: call pipe.to("{first}") before, or put {denoiser_device} first.'
        )


def _local_placement(
    devices: int | Sequence[str] | None,
    num_stages: int | None,
    stride: int,
    denoiser_device: torch.device,
    guidance: str,
) -> Placement:
    name, count = str(denoiser_device), None
    if isinstance(devices, int) and not isinstance(devices, bool):
        count = devices
    elif devices is not None:
        names = parse_devices(devices, denoiser_device)
        _check_driver_device(names[0], denoiser_device)
        name, count = names[0], None if len(names) == 1 and num_stages else len(names)
    return _placement("local", (name,), count, num_stages, stride, guidance)


def _is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _torchrun_placement(
    devices: int | Sequence[str] | None,
    num_stages: int | None,
    stride: int,
    denoiser_device: torch.device,
    guidance: str,
) -> Placement:
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        raise ConfigurationError(
            "runtime='torchrun' was asked for, but this process was not started by torchrun (RANK and "
            "WORLD_SIZE are not set). Start the script with: torchrun --nproc-per-node 2 script.py"
        )
    world_size = int(os.environ["WORLD_SIZE"])
    if isinstance(devices, int) and devices != world_size:
        raise ConfigurationError(
            f"devices={devices} was given, but torchrun started {world_size} processes. Pass neither, or "
            f"start torchrun --nproc-per-node {devices}."
        )
    placement = _placement("torchrun", (), world_size, num_stages, stride, guidance)
    if devices is not None and not isinstance(devices, int):
        names = tuple(devices)
        if len(names) != world_size:
            raise ConfigurationError(
                f"{len(names)} devices were given, but torchrun started {world_size} processes: pass one "
                "each."
            )
    else:
        names = (denoiser_device.type,) * world_size
    return replace(placement, devices=names)

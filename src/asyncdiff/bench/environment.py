"""What this machine is: versions, processors, memory, accelerators. Goes with every figure."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from asyncdiff.config import available_cores

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow", "peft")


def describe_environment() -> dict[str, Any]:
    """Versions, platform and devices as plain JSON values."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in ("asyncdiff", *PACKAGES)},
        "devices": list_devices(),
    }


def installed_version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def list_devices() -> list[dict[str, Any]]:
    """The CPU (`cores` usable by this process) and every accelerator torch sees; `memory_bytes` of each."""
    import psutil

    cpu = {"name": "cpu", "kind": "cpu", "model": _processor(), "memory_bytes": psutil.virtual_memory().total}
    return [{**cpu, "cores": available_cores()}, *_accelerators()]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _accelerators() -> list[dict[str, Any]]:
    try:
        import torch
    except ImportError:
        return []
    found: list[dict[str, Any]] = []
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        for index in range(module.device_count()):
            properties = module.get_device_properties(index)
            found.append(
                {
                    "name": f"{kind}:{index}",
                    "kind": kind,
                    "model": properties.name,
                    "memory_bytes": properties.total_memory,
                }
            )
    if torch.backends.mps.is_available():
        memory_bytes = torch.mps.recommended_max_memory()
        found.append(
            {"name": "mps", "kind": "mps", "model": platform.processor(), "memory_bytes": memory_bytes}
        )
    return found

"""The default process group of torch.distributed, for scripts that ask it which rank they are.

asyncdiff itself never uses it; only the compatibility class asks for it.
"""

from __future__ import annotations

import atexit
import os

import torch.distributed as dist


def ensure_default_group(backend: str) -> None:
    """Initialise the default group unless the script has: torchrun's ranks, or this process alone.

    It is destroyed when the process exits, which torch asks for.
    """
    if dist.is_initialized():
        return
    if is_started_by_torchrun():
        dist.init_process_group(backend)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(_destroy_default_group)


def is_started_by_torchrun() -> bool:
    """Whether RANK and WORLD_SIZE say which of how many processes this is."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def torchrun_world_size() -> int:
    """How many processes torchrun has started; 1 where it has not."""
    return int(os.environ["WORLD_SIZE"]) if is_started_by_torchrun() else 1


def torchrun_rank() -> int:
    """This process's number among all; 0 where torchrun has not started it."""
    return int(os.environ.get("RANK", "0"))


def torchrun_local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _destroy_default_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()

"""Point-to-point transfers between the ranks of a session, never in the default process group.

A script may have its own default group, and two handles may live side by side.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

from asyncdiff.graph import TensorSpec
from asyncdiff.runtime.gloo import GlooTransport
from asyncdiff.runtime.link import Parcel, Pending
from asyncdiff.runtime.nccl import NcclTransport
from asyncdiff.runtime.shared_memory import SharedMemoryTransport, can_share_memory
from asyncdiff.runtime.waiting import Watch


class Transport(Protocol):
    """A `Link` that can be closed."""

    def send(self, to_rank: int, parcel: Parcel, tensor: torch.Tensor, spec: TensorSpec) -> None: ...

    def receive(self, from_rank: int, parcel: Parcel, spec: TensorSpec) -> Pending: ...

    def close(self) -> None: ...


def choose_backend(places: list[tuple[str, str]], *, local: bool) -> str:
    """`"nccl"` where every rank has a CUDA device of its own and NCCL is built in, `"shared_memory"` between
    CPU devices of one host, else `"gloo"`.

    `places`: per rank, its host (any name that tells the hosts apart) and its device. `local`: all ranks are
    on this host.
    """
    devices = [(host, torch.device(device)) for host, device in places]
    if local and can_share_memory() and all(device.type == "cpu" for _, device in devices):
        return "shared_memory"
    all_cuda = all(device.type == "cuda" for _, device in devices)
    distinct = len({(host, device.index or 0) for host, device in devices}) == len(devices)
    return "nccl" if all_cuda and distinct and dist.is_nccl_available() else "gloo"


def open_transport(
    backend: str,
    store: dist.Store,
    rank: int,
    size: int,
    device: str,
    *,
    local: bool,
    watch: Watch | None = None,
) -> Transport:
    """Join the transport of a session.

    `local`: all ranks are on this host, so gloo stays on the loopback interface. `watch` is called every 0.1
    s while a receive waits and may raise to end the wait.
    """
    if backend == "nccl":
        return NcclTransport(store, rank, size, torch.device(device), watch)
    if backend == "shared_memory":
        return SharedMemoryTransport(store, rank, size, watch)
    return GlooTransport(store, rank, size, torch.device(device), local=local, watch=watch)

"""Transfers over gloo: CPU tensors between hosts, weights, and CUDA tensors where NCCL cannot be used.

CUDA tensors go through pinned host memory. Private torch APIs used here: `ProcessGroupGloo._Options` (torch
2.13; see tests/runtime/test_transport.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from asyncdiff.graph import TensorSpec
from asyncdiff.runtime.link import Parcel, Pending, Stream
from asyncdiff.runtime.packing import as_sendable, receive_buffer
from asyncdiff.runtime.waiting import NO_TIMEOUT, Waited, Waiter, Watch, watched


class GlooTransport:
    """gloo, one group for the session; streams are tags."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        device: torch.device,
        *,
        local: bool,
        watch: Watch | None = None,
    ) -> None:
        self._device = device
        self._watch = watch
        self._waiters: dict[tuple[str, int, Stream], Waiter] = {}
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = NO_TIMEOUT
        if local:
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        else:
            options._devices = [dist.ProcessGroupGloo.create_default_device()]
        self._group = watched(lambda: dist.ProcessGroupGloo(store, rank, size, options), watch)

    def send(self, to_rank: int, parcel: Parcel, tensor: torch.Tensor, spec: TensorSpec) -> None:
        flat = as_sendable(tensor, spec)
        if flat.is_cuda:
            flat = _to_pinned(flat)
        work = self._group.send([flat], to_rank, int(parcel.stream))
        self._waiter("send", to_rank, parcel.stream).submit(Waited(lambda: _finish(work, flat), None))

    def receive(self, from_rank: int, parcel: Parcel, spec: TensorSpec) -> Pending:
        buffer, flat = receive_buffer(spec, torch.device("cpu"), pinned=self._device.type == "cuda")
        work = self._group.recv([flat], from_rank, int(parcel.stream))
        waited = Waited(lambda: _finish(work, flat, buffer).to(self._device), self._watch)
        return self._waiter("recv", from_rank, parcel.stream).submit(waited)

    def close(self) -> None:
        for waiter in self._waiters.values():
            waiter.close()
        self._waiters.clear()

    def _waiter(self, direction: str, peer: int, stream: Stream) -> Waiter:
        key = (direction, peer, stream)
        if key not in self._waiters:
            self._waiters[key] = Waiter(f"asyncdiff-{direction}-{peer}-{stream.name.lower()}")
        return self._waiters[key]


def _finish(work: Any, flat: torch.Tensor, result: torch.Tensor | None = None) -> torch.Tensor:
    """Wait for a transfer; `flat` is kept alive until then."""
    work.wait()
    return flat if result is None else result


def _to_pinned(flat: torch.Tensor) -> torch.Tensor:
    pinned = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    pinned.copy_(flat, non_blocking=True)
    torch.cuda.current_stream(flat.device).synchronize()
    return pinned

"""Transfers over NCCL, one group per direction, so that a send never waits behind a receive."""

from __future__ import annotations

import itertools
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from asyncdiff.graph import TensorSpec
from asyncdiff.runtime.link import Parcel, Pending
from asyncdiff.runtime.packing import as_sendable, receive_buffer
from asyncdiff.runtime.waiting import NO_TIMEOUT, WATCH_INTERVAL_S, Watch, watched

_POLL_INTERVAL_S = 2e-5


class NcclTransport:
    """NCCL, a group of two ranks per direction. A wait only makes the current CUDA stream wait.

    The groups are connected at once, in one order on all ranks: NCCL connects two ranks in their first
    transfer, which waits for the other side, so ranks that began with different peers would wait for each
    other forever.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, device: torch.device, watch: Watch | None
    ) -> None:
        self._rank = rank
        self._device = device
        self._watch = watch
        self._in_flight: deque[tuple[Any, torch.Tensor]] = deque()
        pairs = [pair for pair in itertools.permutations(range(size), 2) if rank in pair]
        self._groups = {(source, target): self._open(store, source, target) for source, target in pairs}
        for source, target in pairs:
            watched(partial(self._connect, source, target), watch)

    def send(self, to_rank: int, parcel: Parcel, tensor: torch.Tensor, spec: TensorSpec) -> None:
        flat = as_sendable(tensor, spec)
        self._keep(self._groups[self._rank, to_rank].send([flat], 1, 0), flat)

    def receive(self, from_rank: int, parcel: Parcel, spec: TensorSpec) -> Pending:
        buffer, flat = receive_buffer(spec, self._device)
        work = self._groups[from_rank, self._rank].recv([flat], 0, 0)
        self._keep(work, flat)
        return _NcclPending(work, buffer, self._watch)

    def close(self) -> None:
        for group in self._groups.values():
            group.abort()  # nothing is on its way, unless a peer is lost: then nothing will ever come
        self._groups.clear()
        self._in_flight.clear()

    def _open(self, store: dist.Store, source: int, target: int) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = NO_TIMEOUT
        prefixed = dist.PrefixStore(f"{source}to{target}", store)
        return dist.ProcessGroupNCCL(prefixed, int(self._rank == target), 2, options)

    def _connect(self, source: int, target: int) -> None:
        token = torch.zeros(1, device=self._device)
        group = self._groups[source, target]
        work = group.send([token], 1, 0) if self._rank == source else group.recv([token], 0, 0)
        work.wait()
        torch.cuda.synchronize(self._device)

    def _keep(self, work: Any, flat: torch.Tensor) -> None:
        """Hold the memory until NCCL, which works on a stream of its own, is done with it."""
        while self._in_flight and self._in_flight[0][0].is_completed():
            self._in_flight.popleft()
        self._in_flight.append((work, flat))


@dataclass
class _NcclPending:
    work: Any
    buffer: torch.Tensor
    watch: Watch | None

    def wait(self) -> torch.Tensor:
        if self.watch is not None:
            self._watch_until_complete(self.watch)
        self.work.wait()
        return self.buffer

    def _watch_until_complete(self, watch: Watch) -> None:
        """Poll: a dead peer would leave the stream hanging without a word."""
        checked = time.monotonic()
        while not self.work.is_completed():
            time.sleep(_POLL_INTERVAL_S)
            if time.monotonic() - checked > WATCH_INTERVAL_S:
                watch()
                checked = time.monotonic()

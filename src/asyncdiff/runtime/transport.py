"""Point-to-point transfers over torch.distributed, in process groups of our own.

Never the default group: a script may have its own, and two handles may live side by side. gloo for CPU
tensors and wherever NCCL cannot be used (two workers on one GPU), with pinned host memory in between for CUDA
tensors; NCCL with one group per direction otherwise, so that a send never waits behind a receive. Private
torch APIs used here: `ProcessGroupGloo._Options` (torch 2.13; see tests/runtime/test_transport.py).
"""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from asyncdiff.graph import TensorSpec
from asyncdiff.runtime.link import Parcel, Pending, Stream
from asyncdiff.weights.ownership import dense_spec, empty_tensor, tensor_spec

# Liveness is watched over the control connections; the transport itself never gives up on a slow peer.
_NO_TIMEOUT = timedelta(days=365)
_WATCH_INTERVAL_S = 0.1
_POLL_INTERVAL_S = 2e-5

Watch = Callable[[], None]


class Transport(Protocol):
    """A `Link` that can be closed."""

    def send(self, to_rank: int, parcel: Parcel, tensor: torch.Tensor, spec: TensorSpec) -> None: ...

    def receive(self, from_rank: int, parcel: Parcel, spec: TensorSpec) -> Pending: ...

    def close(self) -> None: ...


def choose_backend(places: list[tuple[str, str]]) -> str:
    """`"nccl"` where every rank has a CUDA device of its own and NCCL is built in, else `"gloo"`.

    `places`: per rank, its host (any name that tells the hosts apart) and its device.
    """
    devices = [(host, torch.device(device)) for host, device in places]
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
    return GlooTransport(store, rank, size, torch.device(device), local=local, watch=watch)


def as_sendable(tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The tensor's elements as a flat tensor in the memory order that the receiver expects."""
    if tuple(tensor.shape) != spec.shape or str(tensor.dtype) != f"torch.{spec.dtype}":
        raise ValueError(f"a tensor of {tensor_spec(tensor)} was about to be sent where {spec} is expected")
    dense, expected = tensor.detach(), dense_spec(spec)
    if tuple(dense.stride()) != expected.stride:
        dense = empty_tensor(expected, dense.device).copy_(dense)
    return dense.as_strided((dense.numel(),), (1,), dense.storage_offset())


def receive_buffer(
    spec: TensorSpec, device: torch.device, *, pinned: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of this spec and the flat view of its memory to receive into."""
    dense = dense_spec(spec)
    flat = torch.empty(
        math.prod(dense.shape), dtype=getattr(torch, dense.dtype), device=device, pin_memory=pinned
    )
    return flat.as_strided(dense.shape, dense.stride), flat


class _Waited:
    """What a waiter thread has been told to wait for. Nothing wakes a thread more cheaply than a lock."""

    def __init__(self, finish: Callable[[], Any], watch: Watch | None) -> None:
        self._finish: Callable[[], Any] | None = finish
        self._watch = watch
        self._error: Exception | None = None
        self._result: Any = None
        self._done = threading.Lock()
        self._done.acquire()

    def run(self) -> None:
        """Called by the waiter thread."""
        assert self._finish is not None
        try:
            self._result = self._finish()
        except Exception as error:  # noqa: BLE001 (whatever the backend raises belongs to whoever waits)
            self._error = error
        self._finish = None  # and with it the buffers it kept alive
        self._done.release()

    def wait(self) -> Any:
        """What `finish` returned, however often it is asked for; every 0.1 s `watch` may end the wait."""
        while not self._done.acquire(timeout=_WATCH_INTERVAL_S):
            if self._watch is not None:
                self._watch()
        self._done.release()
        if self._error is not None:
            raise self._error
        return self._result


class _Waiter:
    """Waits for the transfers of one stream and peer, in order, off the main thread.

    gloo completes a transfer only inside `Work.wait()`, which cannot be interrupted by Ctrl-C nor be given a
    time-out without breaking the pair; a thread can, and the main thread can look at the control connections.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[_Waited | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, waited: _Waited) -> _Waited:
        self._queue.put(waited)
        return waited

    def close(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        while (waited := self._queue.get()) is not None:
            waited.run()
            del waited  # or its tensor would live until the next one comes


def _watched(make: Callable[[], Any], watch: Watch | None) -> Any:
    """Call `make`, which cannot be interrupted, in a thread, and let `watch` end the wait for it."""
    waiter = _Waiter("asyncdiff-joining")
    try:
        return waiter.submit(_Waited(make, watch)).wait()
    finally:
        waiter.close()


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
        self._waiters: dict[tuple[str, int, Stream], _Waiter] = {}
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = _NO_TIMEOUT
        if local:
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        else:
            options._devices = [dist.ProcessGroupGloo.create_default_device()]
        self._group = _watched(lambda: dist.ProcessGroupGloo(store, rank, size, options), watch)

    def send(self, to_rank: int, parcel: Parcel, tensor: torch.Tensor, spec: TensorSpec) -> None:
        flat = as_sendable(tensor, spec)
        if flat.is_cuda:
            flat = _to_pinned(flat)
        work = self._group.send([flat], to_rank, int(parcel.stream))
        self._waiter("send", to_rank, parcel.stream).submit(_Waited(lambda: _finish(work, flat), None))

    def receive(self, from_rank: int, parcel: Parcel, spec: TensorSpec) -> Pending:
        buffer, flat = receive_buffer(spec, torch.device("cpu"), pinned=self._device.type == "cuda")
        work = self._group.recv([flat], from_rank, int(parcel.stream))
        waited = _Waited(lambda: _finish(work, flat, buffer).to(self._device), self._watch)
        return self._waiter("recv", from_rank, parcel.stream).submit(waited)

    def close(self) -> None:
        for waiter in self._waiters.values():
            waiter.close()
        self._waiters.clear()

    def _waiter(self, direction: str, peer: int, stream: Stream) -> _Waiter:
        key = (direction, peer, stream)
        if key not in self._waiters:
            self._waiters[key] = _Waiter(f"asyncdiff-{direction}-{peer}-{stream.name.lower()}")
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
            _watched(partial(self._connect, source, target), watch)

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
        options._timeout = _NO_TIMEOUT
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
            if time.monotonic() - checked > _WATCH_INTERVAL_S:
                watch()
                checked = time.monotonic()

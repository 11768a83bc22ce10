"""Point-to-point transfers over torch.distributed, in process groups of our own.

Never the default group: a script may have its own, and two handles may live side by side. gloo for CPU tensors and
wherever NCCL cannot be used (two workers on one GPU), with pinned host memory in between for CUDA tensors; NCCL
with one group per direction otherwise, so that a send never waits behind a receive.
Private torch APIs used here: `ProcessGroupGloo._Options` (torch 2.13; see tests/runtime/test_transport.py).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from asyncdiff.graph import TensorSpec
from asyncdiff.runtime.link import Parcel, Pending, Stream
from asyncdiff.weights.ownership import empty_tensor, tensor_spec

# Liveness is watched over the control connections; the transport itself never gives up on a slow peer.
_NO_TIMEOUT = timedelta(days=365)
_WATCH_INTERVAL_S = 0.1

Watch = Callable[[], None]


class Transport(Protocol):
    """A `Link` that can be closed."""

    def send(self, to_rank: int, parcel: Parcel, tensor: torch.Tensor, spec: TensorSpec) -> None: ...

    def receive(self, from_rank: int, parcel: Parcel, spec: TensorSpec) -> Pending: ...

    def close(self) -> None: ...


def choose_backend(devices: list[str]) -> str:
    """`"nccl"` where every rank has a CUDA device of its own and NCCL is built in, else `"gloo"`."""
    all_cuda = all(torch.device(device).type == "cuda" for device in devices)
    distinct = len(set(devices)) == len(devices)
    return "nccl" if all_cuda and distinct and dist.is_nccl_available() else "gloo"


def open_transport(
    backend: str, store: dist.Store, rank: int, size: int, device: str, *, local: bool, watch: Watch | None = None
) -> Transport:
    """Join the transport of a session.

    `local`: all ranks are on this host, so gloo stays on the loopback interface. `watch` is called every 0.1 s
    while a receive waits and may raise to end the wait.
    """
    if backend == "nccl":
        return NcclTransport(store, rank, torch.device(device), watch)
    return GlooTransport(store, rank, size, torch.device(device), local=local, watch=watch)


def as_sendable(tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The tensor's elements as a flat tensor in the memory order that the receiver expects."""
    if tuple(tensor.shape) != spec.shape or str(tensor.dtype) != f"torch.{spec.dtype}":
        raise RuntimeError(f"a tensor of {tensor_spec(tensor)} was about to be sent where {spec} is expected")
    dense = tensor.detach()
    if tuple(dense.stride()) != spec.stride or not _is_dense(spec):
        dense = torch.empty_strided(spec.shape, _dense_stride(spec), dtype=dense.dtype, device=dense.device).copy_(dense)
    return dense.as_strided((dense.numel(),), (1,), dense.storage_offset())


def receive_buffer(spec: TensorSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of this spec and the flat view of its memory to receive into."""
    buffer = empty_tensor(TensorSpec(spec.shape, _dense_stride(spec), spec.dtype), device)
    return buffer, buffer.as_strided((buffer.numel(),), (1,))


def _is_dense(spec: TensorSpec) -> bool:
    expected = 1
    for stride, size in sorted(zip(spec.stride, spec.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _dense_stride(spec: TensorSpec) -> tuple[int, ...]:
    if _is_dense(spec):
        return spec.stride
    return tuple(torch.empty(spec.shape, device="meta").stride())


@dataclass
class _Waited:
    """A tensor that a waiter thread has been told to wait for."""

    future: Future[torch.Tensor]
    watch: Watch | None

    def wait(self) -> torch.Tensor:
        if self.watch is None:
            return self.future.result()
        while True:
            try:
                return self.future.result(timeout=_WATCH_INTERVAL_S)
            except FutureTimeoutError:
                self.watch()


class _Waiter:
    """Waits for the transfers of one stream and peer, in order, off the main thread.

    gloo completes a transfer only inside `Work.wait()`, which cannot be interrupted by Ctrl-C nor be given a
    time-out without breaking the pair; a thread can, and the main thread can look at the control connections.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[], torch.Tensor], Future[torch.Tensor]] | None] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, finish: Callable[[], torch.Tensor]) -> Future[torch.Tensor]:
        future: Future[torch.Tensor] = Future()
        self._queue.put((finish, future))
        return future

    def close(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            finish, future = item
            try:
                future.set_result(finish())
            except Exception as error:  # whatever the backend raises belongs to whoever waits
                future.set_exception(error)


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
        options = dist.ProcessGroupGloo._Options()
        options._timeout = _NO_TIMEOUT
        if local:
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        else:
            options._devices = [dist.ProcessGroupGloo.create_default_device()]
        self._group = dist.ProcessGroupGloo(store, rank, size, options)

    def send(self, to_rank: int, parcel: Parcel, tensor: torch.Tensor, spec: TensorSpec) -> None:
        flat = as_sendable(tensor, spec)
        if flat.is_cuda:
            flat = _to_pinned(flat)
        work = self._group.send([flat], to_rank, int(parcel.stream))
        self._waiter("send", to_rank, parcel.stream).submit(lambda: _finish(work, flat))

    def receive(self, from_rank: int, parcel: Parcel, spec: TensorSpec) -> Pending:
        host = torch.device("cpu")
        buffer, flat = receive_buffer(spec, host)
        if self._device.type == "cuda":
            buffer, flat = buffer.pin_memory(), flat.pin_memory()
            flat = buffer.as_strided((buffer.numel(),), (1,))
        work = self._group.recv([flat], from_rank, int(parcel.stream))
        future = self._waiter("recv", from_rank, parcel.stream).submit(
            lambda: _finish(work, flat, buffer).to(self._device)
        )
        return _Waited(future, self._watch)

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
    """NCCL, a group of two ranks per direction. A wait only makes the current CUDA stream wait."""

    def __init__(self, store: dist.Store, rank: int, device: torch.device, watch: Watch | None) -> None:
        self._store = store
        self._rank = rank
        self._device = device
        self._watch = watch
        self._groups: dict[tuple[int, int], Any] = {}

    def send(self, to_rank: int, parcel: Parcel, tensor: torch.Tensor, spec: TensorSpec) -> None:
        flat = as_sendable(tensor, spec)
        flat.record_stream(torch.cuda.current_stream(self._device))
        self._group(self._rank, to_rank).send([flat], 1, 0)

    def receive(self, from_rank: int, parcel: Parcel, spec: TensorSpec) -> Pending:
        buffer, flat = receive_buffer(spec, self._device)
        work = self._group(from_rank, self._rank).recv([flat], 0, 0)
        return _NcclPending(work, buffer, self._watch)

    def close(self) -> None:
        for group in self._groups.values():
            group.shutdown()
        self._groups.clear()

    def _group(self, source: int, target: int) -> Any:
        if (source, target) not in self._groups:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = _NO_TIMEOUT
            self._groups[source, target] = dist.ProcessGroupNCCL(
                dist.PrefixStore(f"{source}to{target}", self._store), int(self._rank == target), 2, options
            )
        return self._groups[source, target]


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
            time.sleep(0)
            if time.monotonic() - checked > _WATCH_INTERVAL_S:
                watch()
                checked = time.monotonic()

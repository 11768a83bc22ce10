"""Transfers between CPU devices of one host: one copy into memory that both processes have mapped.

The sender copies a tensor into a slot of its own (an anonymous file in memory) and tells the receiver so over
a Unix socket, which passes the slot's descriptor the first time. What the receiver gets is the slot's memory
itself: no second copy, no fresh pages, no thread. When nothing refers to that tensor any more the slot goes
back to the sender with the next message, to be filled again. Nothing has a name in the file system, so
nothing is left behind when a process is killed.

Weights, sent once and larger than all states together, go over gloo.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
import select
import socket
import struct
import sys
import weakref
from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist

from asyncdiff.graph import TensorSpec
from asyncdiff.runtime.gloo import GlooTransport
from asyncdiff.runtime.interrupts import interrupts_deferred
from asyncdiff.runtime.link import Parcel, Pending, Stream
from asyncdiff.runtime.packing import as_sendable
from asyncdiff.runtime.waiting import WATCH_INTERVAL_S, Watch, watched
from asyncdiff.weights.ownership import dense_spec

_FILLED, _RETURNED, _DROPPED = range(3)
_HEADER = struct.Struct("<BBIQ")  # what happened, stream, slot, the slot's bytes
_RANK = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")  # process, user, group
_UNUSED_AFTER = 512  # sends to a peer
_SPARE_BYTES = 1 << 20  # so much is mapped before it is worth while to look whether a slot has come back
_SOCKET_BUFFER_BYTES = 1 << 22  # as far as the system allows: headers wait here for a peer that computes


def can_share_memory() -> bool:
    """Whether this system has what the transport needs."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


class SharedMemoryTransport:
    """All ranks on this host, all on the CPU."""

    def __init__(self, store: dist.Store, rank: int, size: int, watch: Watch | None) -> None:
        self._weights = GlooTransport(store, rank, size, torch.device("cpu"), local=True, watch=watch)
        sockets = watched(lambda: _connect_all(store, rank, size), watch)
        self._peers = {peer: _Peer(peer, connection, watch) for peer, connection in sockets.items()}

    def send(self, to_rank: int, parcel: Parcel, tensor: torch.Tensor, spec: TensorSpec) -> None:
        if parcel.stream is Stream.WEIGHTS:
            self._weights.send(to_rank, parcel, tensor, spec)
        else:
            self._peers[to_rank].send(parcel.stream, as_sendable(tensor, spec))

    def receive(self, from_rank: int, parcel: Parcel, spec: TensorSpec) -> Pending:
        if parcel.stream is Stream.WEIGHTS:
            return self._weights.receive(from_rank, parcel, spec)
        return self._peers[from_rank].receive(parcel.stream, spec)

    def close(self) -> None:
        self._weights.close()
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()


class _Slot:
    """Memory that both processes have mapped. It stays mapped as long as a tensor lies in it."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self.memory = mmap.mmap(descriptor, size)
        self.last_use = 0

    def view(self) -> memoryview:
        """To be made a tensor; kept as long as any tensor lies there."""
        return memoryview(self.memory)


class _Loan(weakref.ref[memoryview]):
    """A slot that tensors lie in. When they are gone, it goes where `on_release` puts it.

    `on_release` must be written in C: a Ctrl-C that comes while Python code is called back is swallowed.
    """

    __slots__ = ("slot",)
    slot: int


class _Peer:
    """Both directions between this rank and another, with the slots that either side fills."""

    def __init__(self, rank: int, connection: socket.socket, watch: Watch | None) -> None:
        self._rank = rank
        self._socket = connection
        self._watch = watch
        self._own: dict[int, _Slot] = {}
        self._free: set[int] = set()
        self._foreign: dict[int, _Slot] = {}
        self._loans: dict[int, _Loan] = {}
        self._released: deque[_Loan] = deque()
        self._num_sent = 0
        self._num_slots = 0
        self._arrived: dict[int, deque[int]] = {stream: deque() for stream in Stream}
        self._expected: dict[int, deque[_SharedPending]] = {stream: deque() for stream in Stream}

    def send(self, stream: Stream, flat: torch.Tensor) -> None:
        self._num_sent += 1
        number = self._free_slot(flat.nbytes)
        if number is None and flat.nbytes + sum(slot.size for slot in self._own.values()) > _SPARE_BYTES:
            self.pump()  # some may have come back
            number = self._free_slot(flat.nbytes)
        if number is None:
            number, descriptor = self._add_slot(flat.nbytes)
            descriptors = [descriptor]
        else:
            descriptors = []
        slot = self._own[number]
        slot.last_use = self._num_sent
        _first_elements(slot.view(), flat.dtype, flat.numel()).copy_(flat)
        try:
            self._tell(_FILLED, stream, number, slot.size, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._return_slots()

    def receive(self, stream: Stream, spec: TensorSpec) -> Pending:
        pending = _SharedPending(self, spec)
        if self._arrived[stream]:
            self._fill(pending, self._arrived[stream].popleft())
        else:
            self._expected[stream].append(pending)
        return pending

    def wait_for_news(self) -> None:
        """Until the peer says something, with a look at `watch` every 0.1 s."""
        self._return_slots()
        while not select.select([self._socket], [], [], WATCH_INTERVAL_S)[0]:
            if self._watch is not None:
                self._watch()
        self.pump()

    def pump(self) -> None:
        """Take note of everything that the peer has said."""
        with interrupts_deferred():  # what has been read must be noted
            while True:
                try:
                    data, descriptors, _, _ = socket.recv_fds(self._socket, _HEADER.size, 1)
                except BlockingIOError:
                    return
                except OSError as error:
                    raise self._gone() from error
                if not data:
                    raise self._gone()
                self._note(descriptors, *_HEADER.unpack(data))

    def close(self) -> None:
        self._socket.close()
        self._own.clear()
        self._foreign.clear()

    def _note(self, descriptors: Sequence[int], what: int, stream: int, number: int, size: int) -> None:
        if what == _RETURNED:
            self._free.add(number)
        elif what == _DROPPED:
            del self._foreign[number]
        else:
            for descriptor in descriptors:
                self._foreign[number] = _Slot(descriptor, size)
                os.close(descriptor)
            if self._expected[stream]:
                self._fill(self._expected[stream].popleft(), number)
            else:
                self._arrived[stream].append(number)

    def _fill(self, pending: _SharedPending, number: int) -> None:
        spec = dense_spec(pending.spec)
        view = self._foreign[number].view()
        loan = _Loan(view, self._released.append)
        loan.slot = number
        self._loans[number] = loan
        flat = _first_elements(view, getattr(torch, spec.dtype), math.prod(spec.shape))
        pending.tensor = flat.as_strided(spec.shape, spec.stride)

    def _tell(self, what: int, stream: int, number: int, size: int, descriptors: Sequence[int] = ()) -> None:
        """A peer that computes reads nothing; while its socket is full, listen, for it may be waiting too."""
        header = _HEADER.pack(what, stream, number, size)
        while True:
            try:
                if descriptors:
                    socket.send_fds(self._socket, [header], descriptors)
                else:
                    self._socket.send(header)
            except BlockingIOError:
                readable, _, _ = select.select([self._socket], [self._socket], [], WATCH_INTERVAL_S)
                if readable:
                    self.pump()
                elif self._watch is not None:
                    self._watch()
            except OSError as error:
                raise self._gone() from error
            else:
                return

    def _gone(self) -> RuntimeError:
        return RuntimeError(f"the connection to rank {self._rank} was closed by the other side")

    # -- slots --

    def _free_slot(self, num_bytes: int) -> int | None:
        """The smallest one that holds so much and would not be mostly empty."""
        fitting = [
            (self._own[number].size, number)
            for number in self._free
            if num_bytes <= self._own[number].size <= 2 * max(num_bytes, mmap.PAGESIZE)
        ]
        if not fitting:
            return None
        number = min(fitting)[1]
        self._free.discard(number)
        return number

    def _add_slot(self, num_bytes: int) -> tuple[int, int]:
        """Its number, and a descriptor that the caller must close."""
        self._drop_unused()
        size = -(-max(num_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        descriptor = os.memfd_create("asyncdiff")
        os.ftruncate(descriptor, size)
        number = self._num_slots
        self._num_slots += 1
        self._own[number] = _Slot(descriptor, size)
        return number, descriptor

    def _drop_unused(self) -> None:
        """Give up the slots of sizes that are not sent any more (another resolution)."""
        for number in list(self._free):
            if self._num_sent - self._own[number].last_use > _UNUSED_AFTER:
                self._free.discard(number)
                del self._own[number]
                self._tell(_DROPPED, 0, number, 0)

    def _return_slots(self) -> None:
        """Tell the peer which of its slots nobody here reads any more."""
        if not self._released:
            return
        with interrupts_deferred():
            while self._released:
                number = self._released.popleft().slot
                del self._loans[number]
                self._tell(_RETURNED, 0, number, 0)


def _first_elements(view: memoryview, dtype: torch.dtype, count: int) -> torch.Tensor:
    return torch.frombuffer(view, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


class _SharedPending:
    """A tensor that has been asked for."""

    def __init__(self, peer: _Peer, spec: TensorSpec) -> None:
        self._peer = peer
        self.spec = spec
        self.tensor: torch.Tensor | None = None

    def wait(self) -> torch.Tensor:
        while self.tensor is None:
            self._peer.wait_for_news()
        return self.tensor


def _connect_all(store: dist.Store, rank: int, size: int) -> dict[int, socket.socket]:
    """A connection to each other rank; the sockets are abstract, and only for processes of this user."""
    address = f"\0asyncdiff-{secrets.token_hex(16)}"
    connections: dict[int, socket.socket] = {}
    with _new_socket() as listener:
        listener.bind(address)
        listener.listen(size)
        store.set(f"shared_memory/{rank}", address)
        for peer in range(rank):
            connections[peer] = _new_socket()
            connections[peer].connect(store.get(f"shared_memory/{peer}").decode())
            connections[peer].send(_RANK.pack(rank))
        while len(connections) < size - 1:
            connection, _ = listener.accept()
            if _user_of(connection) == os.getuid():
                connections[_RANK.unpack(connection.recv(_RANK.size))[0]] = connection
            else:
                connection.close()
    for connection in connections.values():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        connection.setblocking(False)
    return connections


def _new_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _user_of(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])

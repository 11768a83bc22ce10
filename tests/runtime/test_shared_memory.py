"""Slots of shared memory: used again when nothing lies in them any more, never before, and never for ever."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import pytest
import torch
import torch.distributed as dist

from asyncdiff.runtime.link import Parcel, Stream
from asyncdiff.runtime.shared_memory import SharedMemoryTransport, can_share_memory
from asyncdiff.weights.ownership import tensor_spec

pytestmark = pytest.mark.skipif(not can_share_memory(), reason="needs Linux")

TIMEOUT_S = 20.0


@pytest.fixture
def pair() -> Iterator[list[SharedMemoryTransport]]:
    store, made = dist.HashStore(), {}

    def open_one(rank: int) -> None:
        made[rank] = SharedMemoryTransport(store, rank, 2, None)

    threads = [threading.Thread(target=open_one, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    yield [made[0], made[1]]
    for transport in made.values():
        transport.close()


def exchange(pair: list[SharedMemoryTransport], tensor: torch.Tensor, *, source: int = 0) -> torch.Tensor:
    parcel, spec = Parcel(Stream.STATE, 0), tensor_spec(tensor)
    pending = pair[1 - source].receive(source, parcel, spec)
    pair[source].send(1 - source, parcel, tensor, spec)
    return pending.wait()


def mappings() -> list[int]:
    """Bytes of each mapping of a slot in this process."""
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if "memfd:asyncdiff" in line]
    return [int(end, 16) - int(start, 16) for start, end in spans]


def test_a_tensor_that_is_kept_is_never_overwritten(pair: list[SharedMemoryTransport]) -> None:
    kept = [exchange(pair, torch.full((1000,), float(i))) for i in range(40)]
    part = exchange(pair, torch.full((1000,), -1.0))[10:20]  # a view keeps the whole
    for _ in range(40):
        exchange(pair, torch.full((1000,), -2.0))
        exchange(pair, torch.zeros(1), source=1)  # gives slots back
    assert [float(tensor[-1]) for tensor in kept] == list(range(40))
    assert torch.equal(part, torch.full((10,), -1.0))


def test_memory_does_not_grow_when_tensors_are_dropped(pair: list[SharedMemoryTransport]) -> None:
    before = len(mappings())
    counts = []
    for i in range(300):
        exchange(pair, torch.full((5000,), float(i)))
        exchange(pair, torch.full((5000,), float(i)), source=1)
        counts.append(len(mappings()) - before)
    assert max(counts) == max(counts[:10])  # two mappings of each slot
    assert max(counts) <= 8


def test_slots_of_a_size_that_is_not_sent_any_more_are_given_up(pair: list[SharedMemoryTransport]) -> None:
    before = len(mappings())
    for _ in range(10):
        exchange(pair, torch.zeros(1 << 20))
    large = len(mappings()) - before
    for i in range(1200):
        exchange(pair, torch.zeros(1 + 3000 * (i % 2)))
        exchange(pair, torch.zeros(1), source=1)
        if i == 600:
            exchange(pair, torch.zeros(100_000))  # a new slot, for which those long unused go
    assert large >= 2
    assert sum(mappings()) < 4 << 20


def test_a_receiver_may_write_into_what_it_got(pair: list[SharedMemoryTransport]) -> None:
    sent = torch.ones(100)
    got = exchange(pair, sent)
    got.mul_(3)
    assert sent.sum() == 100
    assert exchange(pair, torch.full((100,), 2.0)).sum() == 200
    assert got.sum() == 300


def test_tensors_outlive_the_transport(pair: list[SharedMemoryTransport]) -> None:
    got = exchange(pair, torch.arange(100.0))
    for transport in pair:
        transport.close()
    assert torch.equal(got, torch.arange(100.0))


def test_hundreds_of_messages_for_a_peer_that_reads_nothing_do_not_lock_up(
    pair: list[SharedMemoryTransport],
) -> None:
    """Both sides send far more headers than a socket holds before either reads."""
    count, spec = 3000, tensor_spec(torch.zeros(4))
    received: dict[int, list[float]] = {}

    def run(rank: int) -> None:
        for i in range(count):
            pair[rank].send(1 - rank, Parcel(Stream.STATE, i), torch.full((4,), float(i)), spec)
        received[rank] = [
            float(pair[rank].receive(1 - rank, Parcel(Stream.STATE, i), spec).wait()[0]) for i in range(count)
        ]

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert received == {rank: [float(i) for i in range(count)] for rank in range(2)}


def test_a_peer_that_is_gone_is_an_error_for_both_directions(pair: list[SharedMemoryTransport]) -> None:
    spec = tensor_spec(torch.zeros(4))
    pending = pair[0].receive(1, Parcel(Stream.STATE, 0), spec)
    pair[1].close()
    with pytest.raises(RuntimeError, match="rank 1 was closed"):
        pending.wait()
    with pytest.raises(RuntimeError, match="rank 1 was closed"):
        pair[0].send(1, Parcel(Stream.STATE, 0), torch.zeros(4), spec)


def test_a_slot_takes_one_descriptor_on_either_side(pair: list[SharedMemoryTransport]) -> None:
    before, slots = len(os.listdir("/proc/self/fd")), len(mappings())
    for _ in range(50):
        exchange(pair, torch.zeros(10))
        exchange(pair, torch.zeros(10), source=1)
    assert len(os.listdir("/proc/self/fd")) - before == len(mappings()) - slots <= 8


def test_no_python_code_runs_when_a_tensor_is_dropped(pair: list[SharedMemoryTransport]) -> None:
    """What is called back then may raise nothing: a Ctrl-C that Python code there notices would be lost."""
    received = [exchange(pair, torch.ones(1000))]
    called: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            called.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        received.clear()
    finally:
        sys.setprofile(None)
    assert called == []

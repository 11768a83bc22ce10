"""Two transports in two threads of this process; on GPUs where there are any."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from asyncdiff.graph import TensorSpec
from asyncdiff.runtime.link import Parcel, Stream
from asyncdiff.runtime.transport import GlooTransport, Transport, choose_backend, open_transport
from asyncdiff.weights.ownership import bytes_of, tensor_of, tensor_spec

TIMEOUT_S = 20.0


def open_pair(
    backend: str, devices: tuple[str, str], watch: Callable[[], None] | None = None
) -> list[Transport]:
    """The transports of ranks 0 and 1, each made in a thread of its own."""
    store = dist.HashStore()
    made: dict[int, Transport] = {}

    def open_one(rank: int) -> None:
        made[rank] = open_transport(backend, store, rank, 2, devices[rank], local=True, watch=watch)

    threads = [threading.Thread(target=open_one, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    return [made[0], made[1]]


@pytest.fixture(params=["gloo", "shared_memory"])
def pair(request: pytest.FixtureRequest) -> Iterator[list[Transport]]:
    transports = open_pair(request.param, ("cpu", "cpu"))
    yield transports
    for transport in transports:
        transport.close()


TENSORS = {
    "contiguous": torch.randn(3, 4),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": torch.randn(3, 4).t(),
    "with gaps": torch.randn(4, 8)[:, ::2],
    "expanded": torch.randn(1, 4).expand(3, 4),
    "a slice": torch.randn(6, 4)[2:4],
    "number": torch.tensor(7),
    "bool": torch.tensor([True, False, True]),
    "bfloat16": torch.randn(5).bfloat16(),
    "float16": torch.randn(5).half(),
    "int64": torch.arange(9).view(3, 3),
    "empty": torch.empty(0, 3),
    "large": torch.randn(1 << 20),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_arrive_bitwise_in_their_memory_order(pair: list[Transport], name: str) -> None:
    tensor = TENSORS[name]
    pending = pair[1].receive(0, Parcel(Stream.STATE, name), tensor_spec(tensor))
    pair[0].send(1, Parcel(Stream.STATE, name), tensor, tensor_spec(tensor))
    arrived = pending.wait()
    assert arrived.dtype == tensor.dtype
    assert torch.equal(arrived, tensor)
    if name not in ("with gaps", "expanded"):  # those are packed
        assert arrived.stride() == tensor.stride()


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "large"])
def test_small_inputs_travel_as_bytes(name: str) -> None:
    tensor = TENSORS[name]
    arrived = tensor_of(tensor_spec(tensor), bytes_of(tensor))
    assert arrived.dtype == tensor.dtype
    assert torch.equal(arrived, tensor)


def test_streams_keep_their_order_and_do_not_wait_for_each_other(pair: list[Transport]) -> None:
    spec = tensor_spec(torch.zeros(1000))
    streams = (Stream.INPUT, Stream.STATE, Stream.PREDICTION)
    pending = {
        (stream, i): pair[1].receive(0, Parcel(stream, i), spec) for stream in streams for i in range(100)
    }
    for stream in reversed(streams):
        for i in range(100):
            pair[0].send(1, Parcel(stream, i), torch.full((1000,), 1000.0 * stream + i), spec)
    for (stream, i), leaf in pending.items():
        assert leaf.wait()[0] == 1000 * stream + i


def test_both_directions_at_once_with_much_on_the_way(pair: list[Transport]) -> None:
    spec = tensor_spec(torch.zeros(1 << 18))
    for i in range(20):
        for rank in range(2):
            pair[rank].send(1 - rank, Parcel(Stream.STATE, i), torch.full((1 << 18,), float(i + rank)), spec)
    for i, rank in itertools.product(range(20), range(2)):
        assert pair[rank].receive(1 - rank, Parcel(Stream.STATE, i), spec).wait()[-1] == i + 1 - rank


@pytest.mark.parametrize("backend", ["gloo", "shared_memory"])
def test_watch_ends_a_wait_that_would_last_forever(backend: str) -> None:
    class PeerIsGoneError(Exception):
        pass

    is_gone = threading.Event()

    def watch() -> None:
        if is_gone.is_set():
            raise PeerIsGoneError

    pair = open_pair(backend, ("cpu", "cpu"), watch)
    pending = pair[1].receive(0, Parcel(Stream.STATE, 0), tensor_spec(torch.zeros(4)))
    threading.Timer(0.2, is_gone.set).start()
    start = time.monotonic()
    with pytest.raises(PeerIsGoneError):
        pending.wait()
    assert time.monotonic() - start < TIMEOUT_S
    pair[0].send(1, Parcel(Stream.STATE, 0), torch.ones(4), tensor_spec(torch.zeros(4)))
    is_gone.clear()
    assert pending.wait()[0] == 1
    for transport in pair:
        transport.close()


def test_a_tensor_of_another_shape_is_refused(pair: list[Transport]) -> None:
    with pytest.raises(ValueError, match="about to be sent"):
        pair[0].send(1, Parcel(Stream.STATE, 0), torch.zeros(4), TensorSpec((5,), (1,), "float32"))


def test_backend_is_nccl_only_where_each_rank_has_a_gpu_of_its_own() -> None:
    assert choose_backend([("here", "cpu"), ("there", "cpu")], local=False) == "gloo"
    assert choose_backend([("", "cpu"), ("", "cuda:0")], local=True) == "gloo"
    assert choose_backend([("", "cuda:0"), ("", "cuda:0")], local=True) == "gloo"
    assert choose_backend([("", "cuda"), ("", "cuda:0")], local=True) == "gloo"
    two_gpus = "nccl" if dist.is_nccl_available() else "gloo"
    assert choose_backend([("", "cuda:0"), ("", "cuda:1")], local=True) == two_gpus
    assert choose_backend([("here", "cuda:0"), ("there", "cuda:0")], local=False) == two_gpus


def test_private_api_of_torch_is_as_in_2_13() -> None:
    """`ProcessGroupGloo._Options` sets the time-out and the network interface of a group outside the default
    one.
    """
    options = dist.ProcessGroupGloo._Options()
    assert hasattr(options, "_timeout"), torch.__version__
    assert hasattr(options, "_devices"), torch.__version__


@pytest.mark.gpu
def test_gloo_carries_cuda_tensors_through_pinned_memory() -> None:
    pair = open_pair("gloo", ("cuda:0", "cuda:0"))
    assert isinstance(pair[0], GlooTransport)
    for tensor in TENSORS.values():
        sent = tensor.cuda()
        pending = pair[1].receive(0, Parcel(Stream.STATE, 0), tensor_spec(sent))
        pair[0].send(1, Parcel(Stream.STATE, 0), sent, tensor_spec(sent))
        arrived = pending.wait()
        assert arrived.is_cuda
        assert torch.equal(arrived.cpu(), tensor)
    for transport in pair:
        transport.close()


@pytest.mark.gpu(count=2)
def test_nccl_carries_tensors_both_ways_between_two_gpus() -> None:
    pair = open_pair("nccl", ("cuda:0", "cuda:1"))
    received: dict[int, list[torch.Tensor]] = {}

    def exchange(rank: int) -> None:
        with torch.cuda.device(rank):
            spec = tensor_spec(torch.zeros(1 << 20))
            pending = [pair[rank].receive(1 - rank, Parcel(Stream.STATE, i), spec) for i in range(5)]
            for i in range(5):
                tensor = torch.full((1 << 20,), float(i + rank), device=f"cuda:{rank}")
                pair[rank].send(1 - rank, Parcel(Stream.STATE, i), tensor, spec)
            received[rank] = [leaf.wait().cpu() for leaf in pending]

    threads = [threading.Thread(target=exchange, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rank in range(2):
        assert [float(tensor[-1]) for tensor in received[rank]] == [i + 1 - rank for i in range(5)]
    for transport in pair:
        transport.close()

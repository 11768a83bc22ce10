"""One end of the link that `asyncdiff.bench.link` measures.

Started as `python -m asyncdiff.bench.link_process RANK FOLDER DEVICE_0 DEVICE_1`. Leaves its figures in the
folder as `rank-RANK.json`, and ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path

import torch

from asyncdiff.graph import TensorSpec
from asyncdiff.launch.meeting import meeting_point
from asyncdiff.runtime.link import Parcel, Stream
from asyncdiff.runtime.transport import Transport, choose_backend, open_transport

_SIZES = (1_000, 64_000, 1_000_000, 4_000_000)
_UNTIMED_TRIPS, _TRIPS = 5, 30


def main() -> None:
    waiting = threading.Thread(target=_end_with_standard_input, daemon=True)
    waiting.start()
    rank, folder, devices = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    device = torch.device(devices[rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    backend = choose_backend([("", name) for name in devices], local=True)
    transport = open_transport(backend, meeting_point(folder, 2), rank, 2, devices[rank], local=True)
    one_way_s = [(size, _one_way_seconds(transport, rank, device, size)) for size in _SIZES]
    answer = folder / f"rank-{rank}.unfinished"
    answer.write_text(json.dumps({"backend": backend, "one_way_s": one_way_s}))
    answer.rename(answer.with_suffix(".json"))
    waiting.join()  # until the other one has got what was sent last


def _end_with_standard_input() -> None:
    """Wherever this process is stuck: whoever started it may have been killed."""
    sys.stdin.read()
    os._exit(0)


def _one_way_seconds(transport: Transport, rank: int, device: torch.device, size: int) -> float:
    """Half of the median round trip; both ends call it."""
    spec = TensorSpec((size,), (1,), "uint8")
    tensor = torch.zeros(size, dtype=torch.uint8, device=device)
    parcel = Parcel(Stream.STATE, size)
    seconds = []
    for _ in range(_UNTIMED_TRIPS + _TRIPS):
        start = time.perf_counter()
        if rank == 0:
            transport.send(1, parcel, tensor, spec)
        arrived = transport.receive(1 - rank, parcel, spec).wait()
        if rank == 1:
            transport.send(0, parcel, arrived, spec)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[_UNTIMED_TRIPS:]) / 2


if __name__ == "__main__":
    main()

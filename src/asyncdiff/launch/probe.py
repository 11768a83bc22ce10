"""Whether two processes on this machine can exchange tensors: tried, not guessed.

Started as `python -m asyncdiff.launch.probe BACKEND DEVICE [RANK STORE]` by `round_trip`, once per rank, or
by torchrun (which says rank and store in the environment).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

_MODULE = "asyncdiff.launch.probe"
_NUM_ELEMENTS = 1 << 18
_DONE = "round trip done"


@dataclass(frozen=True)
class ProbeResult:
    """Whether it worked, how long it took with the start of the processes, and why not."""

    works: bool
    seconds: float
    why_not: str = ""


def built_backends() -> list[str]:
    """The torch.distributed backends this build of torch has, among those asyncdiff can use."""
    import torch.distributed as dist

    if not dist.is_available():
        return []
    checks = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "xccl": dist.is_xccl_available}
    return [name for name, is_built in checks.items() if is_built()]


def round_trip(backend: str, devices: tuple[str, str], *, timeout_s: float = 60.0) -> ProbeResult:
    """Start two processes that send a tensor to each other through `backend`; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="asyncdiff-probe-") as folder:
        store = str(Path(folder) / "store")
        commands = [
            [sys.executable, "-m", _MODULE, backend, device, str(rank), store]
            for rank, device in enumerate(devices)
        ]
        return _run_all(commands, timeout_s)


def torchrun_round_trip(*, timeout_s: float = 90.0) -> ProbeResult:
    """The same between two CPU processes that torchrun starts."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return _run_all([[*launcher, "-m", _MODULE, "gloo", "cpu"]], timeout_s)


def _run_all(commands: list[list[str]], timeout_s: float) -> ProbeResult:
    start = time.monotonic()
    # Each in a session of its own, so that its whole family can be ended (torchrun starts further processes).
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        for command in commands
    ]
    try:
        outputs = [
            process.communicate(timeout=max(0.1, start + timeout_s - time.monotonic()))[0]
            for process in processes
        ]
    except subprocess.TimeoutExpired:
        return ProbeResult(False, time.monotonic() - start, f"no answer within {timeout_s:g} s")
    finally:
        for process in processes:
            _end_family(process)
    seconds = time.monotonic() - start
    failed = [output for process, output in zip(processes, outputs, strict=True) if process.returncode]
    return ProbeResult(not failed, seconds, _last_line(failed[0]) if failed else "")


def _end_family(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "ended without a word"


def _exchange(backend: str, device: str, rank: int, store_file: str | None) -> None:
    """One of the two ranks: send, receive, compare."""
    import torch
    import torch.distributed as dist

    timeout = timedelta(seconds=30)
    # A process of its own that ends right here, so the default group is nobody else's.
    if store_file is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.FileStore(store_file, 2)
        dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=timeout)
    sent = torch.arange(_NUM_ELEMENTS, dtype=torch.float32, device=device) + rank
    received = torch.empty_like(sent)
    peer = 1 - rank
    exchange = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
    for work in dist.batch_isend_irecv(exchange):
        work.wait()
    if not torch.equal(received, sent - rank + peer):
        raise RuntimeError(f"{backend}: rank {rank} received something else than rank {peer} sent")
    dist.destroy_process_group()
    sys.stdout.write(_DONE + "\n")


def _main(arguments: list[str]) -> None:
    backend, device, *rest = arguments
    rank = int(rest[0]) if rest else int(os.environ["RANK"])
    _exchange(backend, device, rank, rest[1] if rest else None)


if __name__ == "__main__":
    _main(sys.argv[1:])

"""diffusers' context parallelism: every device holds the whole denoiser and computes a part of the sequence.

One process per device, started by torchrun for one measurement and gone after it.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from asyncdiff.bench.architectures import Architecture, DenoisingLoop
from asyncdiff.bench.comparisons.comparison import Comparison, InOrder, NotAvailableError
from asyncdiff.bench.timed_run import TimedRun

REQUEST, ANSWER = "request", "answer"
_RANK = "asyncdiff.bench.comparisons.rank"
_END_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Request:
    """What every process runs, on the device of its rank. `attention`: ulysses or ring."""

    architecture: Architecture
    dtype: torch.dtype
    devices: tuple[str, ...]
    attention: str
    threads: int | None
    steps: int


def comparisons(
    loop: DenoisingLoop, devices: Sequence[str], threads: int | None, in_order: InOrder
) -> list[Comparison]:
    """With Ulysses and with ring attention."""
    names = tuple(devices)
    return [
        Comparison(
            f"context parallelism, {attention}",
            len(names),
            f"{attention}_degree {len(names)}",
            partial(_generate, loop, names, threads, attention),
            in_order,
        )
        for attention in ("ulysses", "ring")
    ]


def _generate(
    loop: DenoisingLoop, devices: tuple[str, ...], threads: int | None, attention: str, steps: int
) -> tuple[TimedRun, torch.Tensor]:
    _check(loop, devices, attention)
    with tempfile.TemporaryDirectory(prefix="asyncdiff-bench-") as folder:
        request = Request(loop.own_architecture(), loop.dtype, devices, attention, threads, steps)
        (Path(folder) / REQUEST).write_bytes(pickle.dumps(request))
        output = _run_ranks(folder, len(devices), _environment(devices, threads))
        answer_file = Path(folder) / ANSWER
        if not answer_file.exists():
            raise NotAvailableError(f"fails on {type(loop.denoiser).__name__}: {_first_error(output)}")
        answer: tuple[TimedRun, torch.Tensor] = pickle.loads(answer_file.read_bytes())
    return answer


def _check(loop: DenoisingLoop, devices: Sequence[str], attention: str) -> None:
    kinds = {torch.device(device).type for device in devices}
    if getattr(loop.denoiser, "_cp_plan", None) is None:
        kind = type(loop.denoiser).__name__
        raise NotAvailableError(f"diffusers' {kind} has no plan for it (_cp_plan)")
    if len(devices) < 2:
        raise NotAvailableError("takes two devices or more")
    if kinds == {"cpu"} and attention == "ring":
        # `_native_attention_forward_op` raises for return_lse; flash and cuDNN attention are CUDA's.
        raise NotAvailableError(
            "diffusers' attention on CPUs does not return the log-sum-exp that a ring adds up"
        )
    if kinds not in ({"cpu"}, {"cuda"}):
        raise NotAvailableError(f"takes CPUs or CUDA devices only, not {', '.join(sorted(kinds))}")
    if kinds == {"cuda"} and len(set(devices)) < len(devices):
        raise NotAvailableError("NCCL wants a CUDA device for every process")


def _environment(devices: Sequence[str], threads: int | None) -> dict[str, str]:
    """Accelerators out of sight where the CPU is to stand for them; torchrun sets one thread unless told."""
    environment = dict(os.environ)
    if torch.device(devices[0]).type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment


def _run_ranks(folder: str, num_ranks: int, environment: dict[str, str]) -> str:
    """What they print; they are gone when it returns."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen(
        [*torchrun, "--nproc-per-node", str(num_ranks), "-m", _RANK, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        return process.communicate()[0]
    except BaseException:
        process.terminate()  # torchrun then ends its ranks, which killing it would leave behind
        process.communicate(timeout=_END_TIMEOUT_S)
        raise


def _first_error(output: str) -> str:
    """Of any rank; torchrun's own report comes after it."""
    found = re.search(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception)\b.*)$", output, re.MULTILINE)
    return found[1] if found else "its processes ended without a word"

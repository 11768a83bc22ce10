"""The script whose start-up `asyncdiff.bench.start_up` watches: load, divide, denoise a few steps.

Started as `python -m asyncdiff.bench.start_up_process`, alone or by torchrun, with one JSON argument. Prints
one line of JSON when it is done, and ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    import torch

    from asyncdiff.bench.architectures import DenoisingLoop, architecture_named
    from asyncdiff.pipeline.denoiser import denoisers_of

    request = json.loads(sys.argv[1])
    dtype, architecture = getattr(torch, request["dtype"]), architecture_named(request["arch"])
    pipe, handle = _divided(request, dtype)
    denoiser = denoisers_of(pipe)[architecture.component]
    loop = DenoisingLoop(architecture, torch.nn.Identity(), request["size"], dtype).to(request["devices"][0])
    loop.denoiser = denoiser  # put there last: a divided one is not moved
    setattr(loop, architecture.component, denoiser)
    loop(request["steps"])
    report = handle.last_run
    answer = {
        "pids": [os.getpid(), *(worker.pid for worker in handle.workers)],
        "devices": report.devices,
        "weight_bytes": report.weight_bytes,
    }
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    sys.stdin.read()  # until the memory of all processes has been looked at


def _divided(request: dict[str, Any], dtype: Any) -> tuple[Any, Any]:
    """The pipeline and its handle."""
    import asyncdiff

    devices, absent = request["devices"], dict.fromkeys(request["absent"])
    if request["way"] != "parallelize":
        pipe = asyncdiff.from_pretrained(
            request["folder"], devices, guidance="together", dtype=dtype, **absent
        )
        return pipe, asyncdiff.handle_of(pipe)
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(request["folder"], dtype=dtype, **absent)
    pipe.to(devices[0])
    return pipe, asyncdiff.parallelize(pipe, devices, guidance="together")


if __name__ == "__main__":
    main()

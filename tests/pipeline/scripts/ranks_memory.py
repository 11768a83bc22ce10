# ruff: noqa: T201 (what it prints is what the test reads)
"""On every rank of torchrun: the denoiser's size, what is left of the script's own copy, what was read of the
folder's weights for a stage; bytes each. Run by test_pretrained.py.
"""

import os
import sys
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from random_pipelines import generate, sd3

import asyncdiff
from asyncdiff.weights import Checkpoint, resident_bytes

rank, (folder, way) = int(os.environ["RANK"]), sys.argv[1:]
absent = dict.fromkeys(
    [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
)
whole = resident_bytes(sd3().transformer)
read_bytes = 0
read = Checkpoint.read


def counted(*args: Any) -> dict[str, torch.Tensor]:
    global read_bytes
    tensors = read(*args)
    read_bytes += sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
    return tensors


Checkpoint.read = counted  # type: ignore[method-assign]
pipe, left = None, 0
try:
    if way == "folder":
        pipe = asyncdiff.from_pretrained(folder, ["cpu", "cpu"], guidance="together", **absent)
    else:
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
        asyncdiff.parallelize(pipe, ["cpu", "cpu"], guidance="together")
    assert generate(pipe).isfinite().all()
    assert rank == 0, "a worker went on"
finally:
    left = 0 if pipe is None else resident_bytes(pipe.transformer)
    print(f"rank {rank}: {whole} {left} {read_bytes}", flush=True)

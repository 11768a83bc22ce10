# ruff: noqa: T201 (what it prints is what the test reads)
"""Two denoisers in one pipeline. Run by test_torchrun.py."""

import os
import sys

import torch

import asyncdiff
from asyncdiff.tiny import TINY_PIPELINES, TinyCall, generate

rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)


def parallelize(pipe: object) -> asyncdiff.Handle:
    try:
        return asyncdiff.parallelize(pipe, num_stages=world_size)
    except SystemExit as leaving:
        print(f"[rank {rank} leaves with {leaving.code}]", flush=True)
        raise


for name in sys.argv[1:]:
    family = TINY_PIPELINES[name]
    pipe = family.build()
    calls = (TinyCall(steps=6), TinyCall(steps=6, seed=1, large=True))
    if rank == 0:
        alone = generate(family, pipe, calls[0])
        with asyncdiff.parallelize(pipe, num_stages=world_size, runtime="local"):
            expected = [generate(family, pipe, call) for call in calls]
        assert not torch.equal(expected[0], alone)
    with parallelize(pipe) as handle:
        for call, latents in zip(calls, expected, strict=True):
            assert torch.equal(generate(family, pipe, call), latents), (name, call)
        assert len(handle.plans) == 2
        assert all(plan is not None for plan in handle.plans.values())
        again = [generate(family, pipe, call) for call in calls]
        assert all(map(torch.equal, again, expected)), name
    assert torch.equal(generate(family, pipe, calls[0]), alone), name
print(f"[rank {rank} is done]", flush=True)

# ruff: noqa: T201 (what it prints is what the test reads)
"""Every setting that fits the number of processes, one `parallelize` after the other. Run by
test_torchrun.py.
"""

import itertools
import os
import sys

import torch
import torch.distributed as dist
from tiny_pipelines import generate, tiny_pipeline

import asyncdiff

rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
if "own-group" in sys.argv:
    dist.init_process_group("gloo")


def parallelize(pipe: object, **options: object) -> asyncdiff.Handle:
    try:
        return asyncdiff.parallelize(pipe, **options)
    except SystemExit as leaving:
        print(f"[rank {rank} leaves with {leaving.code}]", flush=True)
        raise


dtypes = (torch.float32,) if "own-group" in sys.argv else (torch.float32, torch.bfloat16)
together = [
    {
        "num_stages": world_size - stride + 1,
        "stride": stride,
        "partition": kind,
        "forecast": forecast,
        "warmup_steps": 2,
    }
    for stride, kind, forecast in itertools.product((1, 2), ("chain", "nested"), ("latents", "none"))
    if world_size > stride or kind == "chain"
]
split = [{"num_stages": world_size // 2, "guidance": "split", "warmup_steps": 2}] * (world_size % 2 == 0)
for options, dtype in itertools.product(together + split, dtypes):
    pipe = tiny_pipeline(dtype=dtype)
    if rank == 0:
        with asyncdiff.parallelize(pipe, runtime="local", **options):
            expected = generate(pipe)
    with parallelize(pipe, **options):
        assert torch.equal(generate(pipe), expected), options
        assert torch.equal(generate(pipe), expected), options
if "own-group" in sys.argv:
    assert dist.get_world_size() == world_size
    dist.destroy_process_group()
print(f"[rank {rank} is done]", flush=True)

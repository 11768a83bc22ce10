# ruff: noqa: T201 (what it prints is what the test reads)
"""Ctrl-C at chosen and at random moments of a run; the next picture is right each time. Run by
test_scripts.py.
"""

import os
import random
import signal
import sys
import threading
from pathlib import Path

import torch
from saboteur import order, ordering_at, sabotage
from tiny_pipelines import generate, tiny_pipeline

import asyncdiff

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
folder = Path(sys.argv[1])
torch.set_num_threads(1)
pipe = tiny_pipeline()
sabotage(pipe, "conv_out", folder / "worker")
sabotage(pipe, "conv_in", folder / "driver")
handle = asyncdiff.parallelize(pipe, devices=["cpu", "cpu"], partition="chain", warmup_steps=2)
expected = generate(pipe, num_steps=8)
print(handle.workers[0].pid, flush=True)


def is_interrupted(**kwargs: object) -> bool:
    try:
        generate(pipe, num_steps=8, **kwargs)
        return False
    except KeyboardInterrupt:
        return True


for step in (0, 4):
    assert is_interrupted(callback_on_step_end=ordering_at(step, folder / "worker", "interrupt driver"))
    assert torch.equal(generate(pipe, num_steps=8), expected)
    assert is_interrupted(callback_on_step_end=ordering_at(step, folder / "driver", "interrupt"))
    assert torch.equal(generate(pipe, num_steps=8), expected)

moments = random.Random(0)
for _ in range(20):
    timer = threading.Timer(moments.uniform(0.0, 0.1), os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        for _ in range(100):
            generate(pipe, num_steps=8)
        raise AssertionError("Ctrl-C was swallowed")
    except KeyboardInterrupt:
        pass
    assert torch.equal(generate(pipe, num_steps=8), expected)

print("every picture was right", flush=True)
order(folder / "worker", "interrupt driver")
generate(pipe)

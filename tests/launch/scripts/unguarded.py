# ruff: noqa: T201 (what it prints is what the test reads)
"""A script without a guard, also read from standard input; then a thread, and an object of `__main__`."""

import threading

import torch
from tiny_pipelines import generate, tiny_pipeline

import asyncdiff

torch.set_num_threads(1)
pipe = tiny_pipeline()
plain = generate(pipe)


def serve() -> None:
    with asyncdiff.parallelize(pipe, devices=["cpu", "cpu"], guidance="together", warmup_steps=9):
        print("equal" if torch.equal(generate(pipe), plain) else "different", flush=True)


class MyConv(torch.nn.Conv2d):
    pass


serve()
thread = threading.Thread(target=serve)
thread.start()
thread.join()

mine = tiny_pipeline()
mine.unet.conv_out.__class__ = MyConv
handle = asyncdiff.parallelize(mine, devices=["cpu", "cpu"])
try:
    generate(mine)
except asyncdiff.ConfigurationError as error:
    print(error, flush=True)
# no remove(): the workers end with the script

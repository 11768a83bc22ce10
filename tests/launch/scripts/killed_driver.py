# ruff: noqa: T201 (what it prints is what the test reads)
"""A driver that is killed while its workers compute. Run by test_scripts.py."""

import sys
from pathlib import Path

from saboteur import ordering_at, sabotage
from tiny_pipelines import generate, tiny_pipeline

import asyncdiff

orders = Path(sys.argv[1]) / "orders"
pipe = tiny_pipeline()
sabotage(pipe, "conv_out", orders)
handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 3, partition="chain")
print(*(worker.pid for worker in handle.workers), flush=True)
generate(pipe, callback_on_step_end=ordering_at(2, orders, "kill driver"))

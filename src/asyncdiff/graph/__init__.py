"""The denoiser as data: blocks in execution order, what each reads, what must cross between stages.

Pure: standard library only. Built by `asyncdiff.trace`, cut by `asyncdiff.planner`.
"""

from asyncdiff.graph.blocks import Atom, Block, BlockGraph, BlockKey, TensorSpec
from asyncdiff.graph.partition import Partition, Segment, crossing_atoms, crossing_bytes

__all__ = [
    "Atom",
    "Block",
    "BlockGraph",
    "BlockKey",
    "Partition",
    "Segment",
    "TensorSpec",
    "crossing_atoms",
    "crossing_bytes",
]

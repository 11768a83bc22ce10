"""Weights on the move: skeletons without weights, freeing, filling, and getting them back."""

from asyncdiff.weights.ownership import assign_tensors, free_tensors, named_tensors, resident_bytes
from asyncdiff.weights.skeleton import Skeleton, dump_skeleton, load_skeleton
from asyncdiff.weights.source import Checkpoint, find_checkpoint

__all__ = [
    "Checkpoint",
    "Skeleton",
    "assign_tensors",
    "dump_skeleton",
    "find_checkpoint",
    "free_tensors",
    "load_skeleton",
    "named_tensors",
    "resident_bytes",
]

"""Weights on the move: skeletons without weights, freeing, filling, and getting them back."""

from asyncdiff.weights.adapters import merged_adapters
from asyncdiff.weights.ownership import assign_tensors, free_tensors, named_tensors, resident_bytes
from asyncdiff.weights.quantised import undressed
from asyncdiff.weights.skeleton import Skeleton, dump_skeleton, load_skeleton
from asyncdiff.weights.source import Checkpoint, Unloaded, find_checkpoint, read_unloaded

__all__ = [
    "Checkpoint",
    "Skeleton",
    "Unloaded",
    "assign_tensors",
    "dump_skeleton",
    "find_checkpoint",
    "free_tensors",
    "load_skeleton",
    "merged_adapters",
    "named_tensors",
    "read_unloaded",
    "resident_bytes",
    "undressed",
]

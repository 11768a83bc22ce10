"""Sharing the batch of a denoiser call, with guidance its halves, between groups of devices."""

from asyncdiff.guidance.shared_batch import PartsMemory, SharedBatch, batch_size, find_shared_batch

__all__ = ["PartsMemory", "SharedBatch", "batch_size", "find_shared_batch"]

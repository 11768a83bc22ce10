"""What each block costs in seconds: measured where it was profiled, else estimated from its record."""

from __future__ import annotations

from typing import NamedTuple

from asyncdiff.graph import BlockGraph


class Rates(NamedTuple):
    """What a device sustains: floating-point operations and bytes of memory traffic per second."""

    flops_per_s: float
    bytes_per_s: float

    def seconds(self, flops: float, memory_bytes: float) -> float:
        """By a roofline: a sum, not a maximum, because a block is many kernels, some bound by the one and
        some by the other.
        """
        return flops / self.flops_per_s + memory_bytes / self.bytes_per_s


# Only ratios decide where a cut goes; the absolute figures are orders of magnitude for one typical device.
# "cpu": a core or a few, with AVX-512 or so and two memory channels; bfloat16 with AVX512-BF16 or AMX, where
# a core does matrix products so fast that memory traffic counts (fitted to the blocks of SD2.1 at 256 px,
# `asyncdiff bench step`). "cuda": about half of an A100's peak without TF32, and of its memory bandwidth.
_RATES = {
    ("cpu", "float32"): Rates(1.5e11, 2.0e10),
    ("cpu", "bfloat16"): Rates(8.0e11, 1.5e10),
    ("cuda", "float32"): Rates(1.0e13, 1.0e12),
    ("cuda", "float16"): Rates(1.2e14, 1.0e12),
    ("cuda", "bfloat16"): Rates(1.2e14, 1.0e12),
}


def estimate_seconds(
    graph: BlockGraph, device_kind: str = "cpu", dtype: str = "float32"
) -> tuple[float, ...]:
    """Seconds of each block, in execution order.

    Measured seconds where every block has them; a mixture would compare two different units, so otherwise all
    come from a roofline (`Rates.seconds`). Device kinds but "cpu" use the figures of "cuda", and dtypes
    without figures of their own those of float32.
    """
    measured = [block.seconds for block in graph.blocks if block.seconds is not None]
    if len(measured) == len(graph.blocks):
        return tuple(measured)
    rates = rates_of(device_kind, dtype)
    return tuple(rates.seconds(block.flops, block.memory_bytes) for block in graph.blocks)


# How often guidance and a noise scheduler's step move as many bytes as a prediction has (DDIM and flow
# matching on one core, SD2.1 to SD3: 4 to 10). Calls of small kernels are left out, as they are for blocks.
_DRIVER_PASSES = 6


def estimate_driver_seconds(graph: BlockGraph, device_kind: str = "cpu", dtype: str = "float32") -> float:
    """Seconds of the pipeline's own work per step; in the same units as `estimate_seconds`, which for blocks
    that were measured are not those of this estimate: 0 then.
    """
    if all(block.seconds is not None for block in graph.blocks):
        return 0.0
    prediction_bytes = sum(spec.num_bytes for spec in graph.outputs)
    return _DRIVER_PASSES * prediction_bytes / rates_of(device_kind, dtype).bytes_per_s


def rates_of(device_kind: str, dtype: str) -> Rates:
    """The figures used for a device kind and a dtype name."""
    kind = "cpu" if device_kind == "cpu" else "cuda"
    return _RATES.get((kind, dtype), _RATES[kind, "float32"])


def glue_seconds(graph: BlockGraph, block_seconds: tuple[float, ...]) -> float:
    """Seconds of the work outside all blocks, which every stage repeats: measured where it was, else at the
    blocks' average rate."""
    if graph.glue_seconds is not None:
        return graph.glue_seconds
    flops = sum(block.flops for block in graph.blocks)
    return graph.glue_flops * sum(block_seconds) / flops if flops > 0 else 0.0

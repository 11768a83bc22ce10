"""What a partition can be expected to bring, before anything has run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asyncdiff.graph import BlockGraph, Partition, Segment, crossing_bytes
from asyncdiff.planner.costs import glue_seconds
from asyncdiff.planner.partitioning import stage_speeds


@dataclass(frozen=True)
class Predictions:
    """Figures of a partition on stated devices; seconds are as good as the block seconds they come from.

    `segment_seconds`: per segment, on a device of speed 1, glue counted with the first segment of each
    stage (as `simulate` wants them). `stage_seconds`: per stage, one forward on its own (slowest) device.
    `balance`: largest stage x number of stages / sum; 1 is perfect, 1.2 means 20 % above it.
    `ideal_speedup`: of an asynchronous step over the unsplit model on the driver's device, without transfers
    and warm-up. `crossing_bytes_per_step`: all messages between stages, the prediction and the
    denoiser's inputs not included. `crossing_bytes`: (producing segment, reading segment, bytes) of each.
    `prediction_bytes`: of one prediction. `parameter_bytes`: the weights each stage holds.
    """

    segment_seconds: tuple[float, ...]
    stage_seconds: tuple[float, ...]
    balance: float
    ideal_speedup: float
    crossing_bytes_per_step: float
    crossing_bytes: tuple[tuple[int, int, int], ...]
    prediction_bytes: int
    parameter_bytes: tuple[int, ...]


def predict(
    graph: BlockGraph,
    partition: Partition,
    seconds: Sequence[float],
    *,
    stride: int = 1,
    speeds: Sequence[float] | None = None,
) -> Predictions:
    """The predictions for a partition; `seconds` per block and `speeds` per rank as in `partition_chain`."""
    segments = partition.segments(graph)
    stage_speed = stage_speeds(partition.kind, partition.num_stages, stride, speeds)
    glue = glue_seconds(graph, tuple(seconds))
    by_segment = _segment_seconds(graph, segments, seconds, glue)
    by_stage = tuple(
        sum(by_segment[segment.index] for segment in segments if segment.stage == stage) / speed
        for stage, speed in enumerate(stage_speed)
    )
    driver_speed = 1.0 if speeds is None else speeds[0]
    return Predictions(
        segment_seconds=by_segment,
        stage_seconds=by_stage,
        balance=_ratio(max(by_stage) * len(by_stage), sum(by_stage)),
        ideal_speedup=_ratio((sum(seconds) + glue) / driver_speed, max(by_stage) / stride),
        crossing_bytes_per_step=_crossing_bytes_per_step(graph, partition, segments, stride),
        crossing_bytes=tuple((*pair, size) for pair, size in crossing_bytes(graph, segments).items()),
        prediction_bytes=sum(spec.num_bytes for spec in graph.outputs),
        parameter_bytes=tuple(_parameter_bytes(graph, partition, stage) for stage in range(len(by_stage))),
    )


def _segment_seconds(
    graph: BlockGraph, segments: Sequence[Segment], seconds: Sequence[float], glue: float
) -> tuple[float, ...]:
    cost = {block.key: each for block, each in zip(graph.blocks, seconds, strict=True)}
    first = {segment.stage: segment.index for segment in reversed(segments)}
    return tuple(
        sum(cost[key] for key in segment.blocks) + (glue if first[segment.stage] == segment.index else 0.0)
        for segment in segments
    )


def _crossing_bytes_per_step(
    graph: BlockGraph, partition: Partition, segments: tuple[Segment, ...], stride: int
) -> float:
    """Once per round to each reading segment, and to all copies of the replicated stage."""
    per_round = sum(
        num_bytes * (stride if segments[reader].stage == partition.replicated_stage else 1)
        for (_, reader), num_bytes in crossing_bytes(graph, segments).items()
    )
    return per_round / stride


def _parameter_bytes(graph: BlockGraph, partition: Partition, stage: int) -> int:
    """A block that is called twice has its weights once."""
    keys = {key.path: key for key in partition.stages[stage]}.values()
    return graph.glue_parameter_bytes + sum(graph.blocks[graph.index[key]].parameter_bytes for key in keys)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else 1.0

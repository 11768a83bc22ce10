"""What a partition can be expected to bring, before anything has run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asyncdiff.graph import BlockGraph, Partition, Segment, crossing_bytes
from asyncdiff.planner.costs import glue_seconds
from asyncdiff.planner.cuts import first_stage_seconds
from asyncdiff.planner.partitioning import stage_speeds


@dataclass(frozen=True)
class Predictions:
    """Figures of a partition on stated devices; seconds are as good as the block seconds they come from.
    Where groups of devices share the batch of a call, they are those of one group, and of its part of it;
    with `guidance_refresh` those of one half.

    `segment_seconds`: per segment, on a device of speed 1, glue counted with the first segment of each
    stage (as `simulate` wants them). `stage_seconds`: per stage, a round on its own (slowest) device, of
    stage 0 with the driver's own work. `balance`: largest stage x number of stages / sum; 1 is perfect, 1.2
    means 20 % above it. `ideal_speedup`: of an asynchronous step over the unsplit model on the driver's
    device, without transfers and warm-up. `crossing_bytes_per_step`: all messages between stages, the
    prediction and the denoiser's inputs not included. `crossing_bytes`: (producing segment, reading segment,
    bytes) of each.
    `prediction_bytes`: of one prediction. `parameter_bytes`: the weights each stage holds.
    `driver_seconds`: the pipeline's own work per step; `speeds`: of each device (None: all equal); both as
    they were assumed. `latents_stages`: those that read what is new at every step, None where that is not
    known; the others can go ahead while the driver works. `fresh_leads`: (producing segment, reading segment,
    seconds) where leaves are read in the round that produces them: how much later the reader must start than
    the producer.
    """

    segment_seconds: tuple[float, ...]
    stage_seconds: tuple[float, ...]
    balance: float
    ideal_speedup: float
    crossing_bytes_per_step: float
    crossing_bytes: tuple[tuple[int, int, int], ...]
    prediction_bytes: int
    parameter_bytes: tuple[int, ...]
    driver_seconds: float = 0.0
    speeds: tuple[float, ...] | None = None
    latents_stages: tuple[int, ...] | None = None
    fresh_leads: tuple[tuple[int, int, float], ...] = ()

    def step_in_order_seconds(self, stride: int) -> float:
        """Of the unsplit model on the driver's device, which `ideal_speedup` compares with; `stride` as
        it was predicted for."""
        return self.ideal_speedup * max(self.stage_seconds) / stride


def predict(
    graph: BlockGraph,
    partition: Partition,
    seconds: Sequence[float],
    *,
    stride: int = 1,
    speeds: Sequence[float] | None = None,
    driver_seconds: float = 0.0,
    fresh_leads: tuple[tuple[int, int, float], ...] = (),
) -> Predictions:
    """The predictions for a partition; `seconds` per block, `speeds` per rank and `driver_seconds` as in
    `partition_chain`.
    """
    segments = partition.segments(graph)
    stage_speed = stage_speeds(partition.kind, partition.num_stages, stride, speeds)
    glue = glue_seconds(graph, tuple(seconds))
    by_segment = _segment_seconds(graph, segments, seconds, glue)
    work = [
        sum(by_segment[segment.index] for segment in segments if segment.stage == stage)
        for stage in range(partition.num_stages)
    ]
    driver_speed = 1.0 if speeds is None else speeds[0]
    by_stage = (
        first_stage_seconds(work[0], stage_speed[0], driver_speed, stride * driver_seconds),
        *(own / speed for own, speed in zip(work[1:], stage_speed[1:], strict=True)),
    )
    in_order = (sum(seconds) + glue) / driver_speed + driver_seconds
    return Predictions(
        segment_seconds=by_segment,
        stage_seconds=by_stage,
        balance=_ratio(max(by_stage) * len(by_stage), sum(by_stage)),
        ideal_speedup=_ratio(in_order, max(by_stage) / stride),
        crossing_bytes_per_step=_crossing_bytes_per_step(graph, partition, segments, stride),
        crossing_bytes=tuple((*pair, size) for pair, size in crossing_bytes(graph, segments).items()),
        prediction_bytes=sum(spec.num_bytes for spec in graph.outputs),
        parameter_bytes=tuple(_parameter_bytes(graph, partition, stage) for stage in range(len(by_stage))),
        driver_seconds=driver_seconds,
        speeds=None if speeds is None else tuple(speeds),
        latents_stages=_latents_stages(graph, segments) if graph.latents else None,
        fresh_leads=fresh_leads,
    )


def _latents_stages(graph: BlockGraph, segments: Sequence[Segment]) -> tuple[int, ...]:
    inputs = {block.key: set(block.inputs) for block in graph.blocks}
    readers = {
        segment.stage
        for segment in segments
        if any(inputs[key].intersection(graph.latents) for key in segment.blocks)
    }
    if set(graph.output_inputs).intersection(graph.latents):
        readers.add(segments[-1].stage)
    return tuple(sorted(readers))


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

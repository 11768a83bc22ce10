"""From a denoiser call to everything the stages need to know about calls of that structure."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asyncdiff.config import Settings
from asyncdiff.errors import UnsupportedDenoiserError
from asyncdiff.graph import BlockGraph, BlockKey, Partition
from asyncdiff.graph.wiring import Wiring, wire
from asyncdiff.pipeline.denoiser import replaced_forward
from asyncdiff.pipeline.partition_request import PartitionRequest
from asyncdiff.planner import Plan, choose_plan, make_plan, partition_by_names
from asyncdiff.planner.costs import rates_of
from asyncdiff.stage import OutputSpec, StageSpec, stage_spec
from asyncdiff.trace import Inputs, Recording, call_costs, find_blocks, paths_below, record, reown
from asyncdiff.weights import Skeleton, load_skeleton

# Blocks above this part of an even share, of work or weights, are opened where a partition is chosen freely.
_FINE_SHARE = 0.2


@dataclass(frozen=True)
class Analysis:
    """One input structure: its graph, partition, the stages' specs and what crosses between them.

    `number`: how messages refer to it. `steering`: the inputs whose values decided what the recorded forward
    did, with these values; calls with others need an analysis of their own.
    """

    number: int
    graph: BlockGraph
    partition: Partition
    specs: Mapping[int, StageSpec]
    wiring: Wiring
    steering: Mapping[str, torch.Tensor]

    def covers(self, inputs: Inputs) -> bool:
        """Whether the recorded forward is also that of these inputs, which are of the same structure."""
        given = inputs.tensors()
        return all(torch.equal(given[name], recorded) for name, recorded in self.steering.items())

    @property
    def output(self) -> OutputSpec:
        return self.specs[0].output


def record_call(
    denoiser: nn.Module, skeleton: Skeleton, inputs: Inputs, device: torch.device, *, weights_at_hand: bool
) -> Recording:
    """Record a call on a weightless copy; on the live denoiser only where values of weights decide what it
    does."""
    try:
        return record(load_skeleton(skeleton, {}), inputs, device=device)
    except UnsupportedDenoiserError:
        if not weights_at_hand:
            raise
    with replaced_forward(denoiser, None):
        return record(denoiser, inputs, device=device, live=True)


def first_plan(
    recording: Recording,
    settings: Settings,
    devices: Sequence[str],
    partition: PartitionRequest,
    *,
    weights: Skeleton,
    dtype: torch.dtype,
    threads_per_device: int | None,
    seconds: Mapping[BlockKey, float] | None = None,
    driver_seconds: float | None = None,
    speeds: Sequence[float] | None = None,
    max_weight_bytes: float = math.inf,
) -> Plan:
    """The plan for a recorded call: cut by measured `seconds`, else by an estimate from FLOPs and bytes.

    `partition`: a kind, the module names of each stage, or None to choose (`asyncdiff.planner.choice`).
    `driver_seconds`, `speeds`: as `make_plan` takes them. `max_weight_bytes`: what one device can hold;
    counts where the partition is chosen.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    cost = rates_of(torch.device(devices[0]).type, dtype_name).seconds

    def make(graph: BlockGraph, **how: Any) -> Plan:
        return make_plan(
            graph,
            settings,
            devices,
            dtype=dtype_name,
            threads_per_device=threads_per_device,
            driver_seconds=driver_seconds,
            speeds=speeds,
            **how,
        )

    def make_within(graph: BlockGraph, kind: str, share: float | None) -> Plan:
        return make(graph, kind=kind, max_weight_share=_weight_share(graph, share, max_weight_bytes))

    @functools.cache
    def opened_for(kind: str) -> BlockGraph:
        return find_blocks(recording, settings.num_stages, seconds=seconds, cost=cost, kind=kind)

    if partition is not None and not isinstance(partition, str):
        graph = find_blocks(recording, block_paths=_paths(partition), seconds=seconds)
        return make(graph, partition=partition_by_names(graph, partition))
    is_equal = len(set(speeds or ())) < 2
    if isinstance(partition, str) and is_equal:
        return make_within(opened_for(partition), partition, None)
    fine = _fine_blocks(recording, settings, weights, seconds, cost)
    if isinstance(partition, str):
        return make_within(fine, partition, None)  # `opened_for` cuts into equal stages
    makers = [
        lambda kind, share: make_within(opened_for(kind), kind, share),
        lambda kind, share: make_within(fine, kind, share),
    ]
    return choose_plan(makers, settings.num_stages)


def _weight_share(graph: BlockGraph, share: float | None, max_weight_bytes: float) -> float | None:
    """The largest share of the blocks' weights that a device may hold, whose memory has room for the glue's
    too."""
    if math.isinf(max_weight_bytes):
        return share
    total = sum(block.parameter_bytes for block in graph.blocks)
    held = max(0.0, max_weight_bytes - graph.glue_parameter_bytes) / max(total, 1)
    return held if share is None else min(held, share)


def _fine_blocks(
    recording: Recording,
    settings: Settings,
    weights: Skeleton,
    seconds: Mapping[BlockKey, float] | None,
    cost: Callable[[float, float], float],
) -> BlockGraph:
    """Finer than balance alone asks for, so that a cut can also divide the weights."""
    paths = paths_below(
        call_costs(recording),
        {name: spec.num_bytes for name, spec in weights.specs.items()},
        max_share=_FINE_SHARE / settings.num_stages,
        seconds=seconds,
        cost=cost,
    )
    return find_blocks(recording, block_paths=paths, seconds=seconds)


def analyse(number: int, recording: Recording, inputs: Inputs, plan: Plan) -> Analysis:
    """The analysis of the first call, recorded with `inputs`, under a plan."""
    graph = find_blocks(recording, block_paths=_paths(plan.stages))
    return _analysis(number, recording, inputs, graph, plan.partition(graph), plan)


def analyse_again(
    number: int, recording: Recording, inputs: Inputs, plan: Plan, owners: Partition
) -> Analysis:
    """The analysis of a call of another structure, with every block where `owners` has it."""
    graph = find_blocks(recording, block_paths=_paths(plan.stages))
    return _analysis(number, recording, inputs, graph, reown(owners, graph), plan)


def _analysis(
    number: int, recording: Recording, inputs: Inputs, graph: BlockGraph, partition: Partition, plan: Plan
) -> Analysis:
    wiring = wire(graph, partition.segments(graph), plan.fresh_atoms)
    specs = {
        stage: stage_spec(recording, graph, partition, stage, wiring.fresh)
        for stage in range(partition.num_stages)
    }
    given = inputs.tensors()
    steering = {name: given[name].clone() for name in recording.steering_inputs}
    return Analysis(number, graph, partition, specs, wiring, steering)


def _paths(stages: Sequence[Sequence[Any]]) -> list[str]:
    return list(dict.fromkeys(str(name).split("#")[0] for names in stages for name in names))

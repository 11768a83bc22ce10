"""From a denoiser call to everything the stages need to know about calls of that structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asyncdiff.config import Settings
from asyncdiff.errors import UnsupportedDenoiserError
from asyncdiff.graph import BlockGraph, BlockKey, Partition, crossing_atoms
from asyncdiff.graph.wiring import Wiring, wire
from asyncdiff.pipeline.denoiser import replaced_forward
from asyncdiff.planner import Plan, make_plan, partition_by_names
from asyncdiff.planner.costs import rates_of
from asyncdiff.stage import OutputSpec, StageSpec, stage_spec
from asyncdiff.trace import Inputs, Recording, find_blocks, record, reown
from asyncdiff.weights import Skeleton, load_skeleton

PartitionRequest = str | Sequence[Sequence[str]] | None


@dataclass(frozen=True)
class Analysis:
    """One input structure: its graph, partition, the stages' specs and what crosses between them.

    `number`: how messages refer to it.
    """

    number: int
    graph: BlockGraph
    partition: Partition
    specs: Mapping[int, StageSpec]
    wiring: Wiring

    @property
    def output(self) -> OutputSpec:
        return self.specs[0].output

    @property
    def crossings(self) -> tuple[tuple[int, int], ...]:
        """(producing segment, reading segment) pairs between which anything crosses."""
        return tuple(crossing_atoms(self.graph, self.partition.segments(self.graph)))


def record_call(
    denoiser: nn.Module, skeleton: Skeleton, inputs: Inputs, device: torch.device, *, weights_at_hand: bool
) -> Recording:
    """Record a call on a weightless copy; on the live denoiser only where values decide what it does."""
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
    dtype: torch.dtype,
    threads_per_device: int | None,
    seconds: Mapping[BlockKey, float] | None = None,
) -> Plan:
    """The plan for a recorded call: cut by measured `seconds`, else by an estimate from FLOPs and bytes."""
    dtype_name = str(dtype).removeprefix("torch.")
    if partition is None or isinstance(partition, str):
        kind = partition or "chain"
        rates = rates_of(torch.device(devices[0]).type, dtype_name)
        graph = find_blocks(
            recording,
            settings.num_stages,
            seconds=seconds,
            cost=lambda flops, moved: flops / rates.flops_per_s + moved / rates.bytes_per_s,
            kind=kind,
        )
        chosen = None
    else:
        graph = find_blocks(recording, block_paths=_paths(partition), seconds=seconds)
        chosen = partition_by_names(graph, partition)
        kind = chosen.kind
    return make_plan(
        graph,
        settings,
        devices,
        kind=kind,
        partition=chosen,
        dtype=dtype_name,
        threads_per_device=threads_per_device,
    )


def analyse(number: int, recording: Recording, plan: Plan) -> Analysis:
    """The analysis of the first recorded call under a plan."""
    graph = find_blocks(recording, block_paths=_paths(plan.stages))
    return _analysis(number, recording, graph, plan.partition(graph))


def analyse_again(number: int, recording: Recording, plan: Plan, owners: Partition) -> Analysis:
    """The analysis of a call of another structure, with every block where `owners` has it."""
    called = {f"{key.path}." for key in recording.call_of}
    paths = [name for name in _paths(plan.stages) if any(path.startswith(f"{name}.") for path in called)]
    graph = find_blocks(recording, block_paths=paths)
    return _analysis(number, recording, graph, reown(owners, graph))


def _analysis(number: int, recording: Recording, graph: BlockGraph, partition: Partition) -> Analysis:
    specs = {stage: stage_spec(recording, graph, partition, stage) for stage in range(partition.num_stages)}
    return Analysis(number, graph, partition, specs, wire(graph, partition.segments(graph)))


def _paths(stages: Sequence[Sequence[Any]]) -> list[str]:
    return list(dict.fromkeys(str(name).split("#")[0] for names in stages for name in names))

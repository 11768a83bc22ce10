"""From a graph to a partition: which stage runs which blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from asyncdiff.config import check_count
from asyncdiff.errors import ConfigurationError
from asyncdiff.graph import BlockGraph, BlockKey, Partition
from asyncdiff.planner.costs import estimate_seconds, glue_seconds
from asyncdiff.planner.crossing import EnteringBytes
from asyncdiff.planner.cuts import Load, chain_cuts, nested_cuts

DEFAULT_IMBALANCE = 0.005


def partition_chain(
    graph: BlockGraph,
    num_stages: int,
    *,
    speeds: Sequence[float] | None = None,
    stride: int = 1,
    seconds: Sequence[float] | None = None,
    imbalance: float = DEFAULT_IMBALANCE,
    max_weight_share: float | None = None,
    driver_seconds: float = 0.0,
) -> Partition:
    """The chain whose largest stage time is least; among those, the one that hands over the fewest bytes.

    `speeds`: one per rank (`num_stages + stride - 1` of them), relative to the device on which `seconds`
    holds; None for equal devices. `seconds`: one per block, None for `estimate_seconds(graph)`. `imbalance`:
    how much longer, relatively, the largest stage may be than it must, if that makes fewer bytes cross.
    `max_weight_share`: the largest share (0 to 1) of the blocks' weights that one device may hold.
    `driver_seconds`: the pipeline's own work per step (noise scheduler, guidance), which the driver does on
    rank 0 beside its stage, so that stage 0 gets less; as measured there, whatever the speed of rank 0.
    Raises `ConfigurationError` where there are fewer blocks than stages, or no cut within that share.
    """
    load = _load("chain", graph, num_stages, speeds, stride, seconds, max_weight_share, driver_seconds)
    _check_blocks(graph, num_stages, num_stages)
    cuts = chain_cuts(load, EnteringBytes(graph), copies=stride, imbalance=imbalance)
    return Partition("chain", _stages(graph, cuts))


def partition_nested(
    graph: BlockGraph,
    num_stages: int,
    *,
    speeds: Sequence[float] | None = None,
    stride: int = 1,
    seconds: Sequence[float] | None = None,
    imbalance: float = DEFAULT_IMBALANCE,
    max_weight_share: float | None = None,
    driver_seconds: float = 0.0,
) -> Partition:
    """The nested split (stage 0 holds the first and the last blocks) chosen as `partition_chain` chooses.

    With one stage it is the chain of one.
    """
    load = _load("nested", graph, num_stages, speeds, stride, seconds, max_weight_share, driver_seconds)
    if num_stages == 1:
        return Partition("nested", _stages(graph, (0, len(graph.blocks))))
    _check_blocks(graph, num_stages, num_stages + 1)
    cuts = nested_cuts(load, EnteringBytes(graph), copies=stride, imbalance=imbalance)
    before, after = _stages(graph, (0, cuts[0]))[0], _stages(graph, (cuts[-1], len(graph.blocks)))[0]
    return Partition("nested", (before + after, *_stages(graph, cuts)))


def stage_speeds(
    kind: str, num_stages: int, stride: int, speeds: Sequence[float] | None = None
) -> tuple[float, ...]:
    """The speed of each stage from that of each rank: a replicated stage is as fast as its slowest device."""
    given = check_speeds(num_stages, stride, speeds)
    replicated = 0 if kind == "nested" else num_stages - 1
    slowest = min(given[replicated], *given[num_stages:], given[replicated])
    return (*given[:replicated], slowest, *given[replicated + 1 : num_stages])


def slowest_of_groups(speeds: Sequence[float], groups: int) -> tuple[float, ...]:
    """One speed per rank of a group, from those of the devices of all groups, which are divided alike and
    wait for one another."""
    size = len(speeds) // groups
    return tuple(min(speeds[rank::size]) for rank in range(size))


def share_used_by_groups(speeds: Sequence[float], groups: int) -> float:
    """How much of what the devices could do groups of equal work use: each waits for the slowest."""
    return groups * sum(slowest_of_groups(speeds, groups)) / sum(speeds)


def check_speeds(
    num_stages: int, stride: int, speeds: Sequence[float] | None, groups: int = 1
) -> tuple[float, ...]:
    """The speed of each device, 1.0 unless given; `ConfigurationError` for another number, or for what is no
    speed.
    """
    check_count("num_stages", num_stages)
    check_count("stride", stride)
    num_workers = groups * (num_stages + stride - 1)
    given = (1.0,) * num_workers if speeds is None else tuple(speeds)
    if len(given) != num_workers or not all(map(_is_speed, given)):
        raise ConfigurationError(
            f"num_stages={num_stages} with stride={stride} needs {num_workers} positive device speeds "
            f"({_rule(groups)}), but {list(given)} were given."
        )
    return given


def _rule(groups: int) -> str:
    size = "num_stages + stride - 1"
    return size if groups == 1 else f"{groups} groups of {size}"


def _is_speed(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _load(
    kind: str,
    graph: BlockGraph,
    num_stages: int,
    speeds: Sequence[float] | None,
    stride: int,
    seconds: Sequence[float] | None,
    max_weight_share: float | None,
    driver_seconds: float,
) -> Load:
    costs = estimate_seconds(graph) if seconds is None else tuple(seconds)
    if len(costs) != len(graph.blocks):
        raise ConfigurationError(f"The graph has {len(graph.blocks)} blocks, but seconds for {len(costs)}.")
    weights = [float(block.parameter_bytes) for block in graph.blocks]
    most = math.inf if max_weight_share is None else max_weight_share * sum(weights)
    return Load.of(
        costs,
        glue_seconds(graph, costs),
        stage_speeds(kind, num_stages, stride, speeds),
        weights,
        most,
        driver_speed=1.0 if speeds is None else speeds[0],
        driver_seconds=stride * driver_seconds,
    )


def _check_blocks(graph: BlockGraph, num_stages: int, least: int) -> None:
    if len(graph.blocks) < least:
        raise ConfigurationError(
            f"num_stages={num_stages} needs at least {least} blocks, but this denoiser has "
            f"{len(graph.blocks)}. Use fewer stages."
        )


def _stages(graph: BlockGraph, cuts: Sequence[int]) -> tuple[tuple[BlockKey, ...], ...]:
    return tuple(tuple(block.key for block in graph.blocks[start:end]) for start, end in pairwise(cuts))

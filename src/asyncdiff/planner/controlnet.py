"""How long steps take with a ControlNet, in the driver or on a device of its own. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from asyncdiff.errors import ConfigurationError
from asyncdiff.graph import BlockGraph
from asyncdiff.planner.plan import Plan
from asyncdiff.planner.timing import simulate
from asyncdiff.simulation import Machine


@dataclass(frozen=True)
class ControlNetCost:
    """`seconds`: of a call, on a device of speed 1; `output_bytes`: of what it returns. `read_after_seconds`:
    how long the denoiser, on a device of speed 1 by itself, computes before it reads any of that; of a part
    of the batch, where groups share it."""

    seconds: float
    output_bytes: int
    read_after_seconds: float


def seconds_before_reading(graph: BlockGraph, seconds: Sequence[float], inputs: Collection[str]) -> float:
    """How long the blocks take that come before the first which reads one of these inputs; `seconds` of
    each."""
    wanted = set(inputs)
    total = 0.0
    for block, each in zip(graph.blocks, seconds, strict=True):
        if wanted.intersection(block.inputs):
            break
        total += each
    return total


def step_seconds(
    plan: Plan, machine: Machine, cost: ControlNetCost, *, ahead: bool, num_steps: int = 50
) -> tuple[float, ...]:
    """Predicted seconds of each step of a run by a plan of the denoiser, with the ControlNet on the last of
    the machine's devices. (In the driver it is the driver's own work, `driver_seconds` of a plan.)

    Where every device holds the whole denoiser, they begin without what the ControlNet returns; stages wait
    for it. `ahead`: a step takes as long as the slower of denoiser and ControlNet, after warm-up and the step
    in which it gets ahead. Raises `ConfigurationError` where the machine has another number of devices.
    """
    assert plan.predictions is not None
    speeds = machine.device_speeds
    if len(speeds) != plan.num_workers + 1:
        raise ConfigurationError(
            f"The plan has {plan.num_workers} workers, so with a ControlNet it needs a machine of "
            f"{plan.num_workers + 1} devices, but it has {len(speeds)}."
        )
    beside = replace(machine, device_speeds=speeds[:-1])
    busy = machine.busy_speed
    # What is read where it was not made crosses twice: to the driver, and from there to a worker.
    crossings = 1 if plan.num_workers == 1 else 2
    computed_s = cost.seconds / (speeds[-1] * busy)
    arrival_s = computed_s + crossings * machine.transfer_s(cost.output_bytes)
    if plan.num_workers == 1:  # which has a busy neighbour only while the ControlNet is at work
        without = simulate(plan, replace(beside, busy_speed=1.0), num_steps=num_steps).step_seconds
        read_after_s = cost.read_after_seconds / speeds[0]
        overlapped = tuple(each + max(read_after_s / busy, arrival_s) - read_after_s for each in without)
        beside_it = tuple(each + (1.0 - busy) * computed_s for each in without)
    else:
        without = beside_it = simulate(plan, beside, num_steps=num_steps).step_seconds
        if plan.settings.group_size == 1:
            late_s = max(0.0, arrival_s - cost.read_after_seconds / (min(speeds[:-1]) * busy))
            overlapped = tuple(each + late_s for each in without)
        else:
            waiting_s = plan.predictions.driver_seconds + arrival_s
            overlapped = simulate(plan, beside, num_steps=num_steps, driver_seconds=waiting_s).step_seconds
    if not ahead:
        return overlapped
    exact = plan.warmup_steps + 1
    return (*overlapped[:exact], *(max(each, arrival_s) for each in beside_it[exact:]))

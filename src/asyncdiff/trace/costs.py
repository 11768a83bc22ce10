"""What each call of the denoiser costs: measured where it was, else estimated from its FLOPs and bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from asyncdiff.graph import BlockKey
from asyncdiff.trace.recording import Recording

EstimateCost = Callable[[float, float], float]


def flops_only(flops: float, memory_bytes: float) -> float:
    """The default estimate. FLOPs alone misjudge: SD2.1 split by them was 1.22 x the ideal on a CPU."""
    return flops


@dataclass(frozen=True)
class CallCost:
    """Work of one call, everything below it included, and the candidate it lies in (None: the denoiser)."""

    flops: float
    memory_bytes: float
    parent: BlockKey | None


def subtree_costs(
    recording: Recording, seconds: Mapping[BlockKey, float] | None, estimate: EstimateCost
) -> tuple[float, ...]:
    """Cost of every call. A call that was not measured gets its estimate, scaled as its nearest measured
    ancestor (or, without one, all measured calls together) was measured against theirs."""
    estimates = [estimate(flops, moved) for flops, moved in recording.work]
    if not seconds:
        return tuple(estimates)
    measured = {index: seconds[call.key] for index, call in enumerate(recording.calls) if call.key in seconds}
    known = sum(estimates[index] for index in measured)
    overall = sum(measured.values()) / known if known else 1.0
    scales: list[float] = []
    costs: list[float] = []
    for index, call in enumerate(recording.calls):
        above = scales[call.parent] if call.parent >= 0 else overall
        if index in measured and estimates[index] > 0:
            scales.append(measured[index] / estimates[index])
        else:
            scales.append(above)
        costs.append(measured.get(index, estimates[index] * above))
    return tuple(costs)

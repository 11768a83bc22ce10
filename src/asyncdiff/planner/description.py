"""A plan as a short table of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncdiff.planner.plan import Plan


def describe(plan: Plan) -> str:
    """One row per stage, then one line of predictions."""
    rows: list[tuple[str, ...]] = [("stage", "device", "blocks", "first .. last", "cost", "weights")]
    rows += [_row(plan, stage) for stage in range(plan.num_stages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in [_heading(plan), *lines, *_summary(plan)]) + "\n"


def _heading(plan: Plan) -> str:
    shift = ", time shift" if plan.time_shift else ""
    more = f" or more (tolerance {plan.tolerance:g})" if plan.tolerance is not None else ""
    groups = f", the batch shared by {plan.groups} groups" if plan.groups > 1 else ""
    refresh = f", guidance refreshed every {plan.guidance_refresh} steps" if plan.guidance_refresh > 1 else ""
    return (
        f"{plan.kind} of {plan.num_stages}, stride {plan.stride}, {plan.warmup_steps} warm-up "
        f"step{'s' * (plan.warmup_steps != 1)}{more}, forecast {plan.forecast}, "
        f"freshness {plan.freshness}{shift}{groups}{refresh}"
    )


def _row(plan: Plan, stage: int) -> tuple[str, ...]:
    names = plan.stages[stage]
    span = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
    seconds = plan.predictions.stage_seconds if plan.predictions else ()
    weights = plan.predictions.parameter_bytes if plan.predictions else ()
    return (
        str(stage), ", ".join(_devices(plan, stage)), str(len(names)), span,
        _share(seconds, stage), _share(weights, stage),
    )  # fmt: skip


def _devices(plan: Plan, stage: int) -> list[str]:
    """The device of a stage, and of the further copies of the replicated one."""
    if len(plan.devices) == 1:
        return list(plan.devices)
    replicated = 0 if plan.kind == "nested" else plan.num_stages - 1
    size = plan.settings.group_size
    found: list[str] = []
    for first in range(0, plan.num_workers, size):
        group = plan.devices[first : first + size]
        found += [group[stage], *(group[plan.num_stages :] if stage == replicated else ())]
    return found


def _share(amounts: tuple[float, ...], stage: int) -> str:
    total = sum(amounts)
    return f"{amounts[stage] / total:.1%}" if total > 0 else "-"


def _summary(plan: Plan) -> list[str]:
    if plan.predictions is None:
        return []
    late = f", {len(plan.fresh)} reads in time" if plan.fresh else ""
    return [
        f"balance {plan.predictions.balance:.3f} (1 is perfect), ideal speed-up "
        f"{plan.predictions.ideal_speedup:.2f}x, crossing "
        f"{plan.predictions.crossing_bytes_per_step / 1e6:.2f} MB per step{late}"
    ]

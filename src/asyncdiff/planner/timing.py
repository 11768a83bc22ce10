"""How long a plan is expected to take on a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from asyncdiff.errors import ConfigurationError
from asyncdiff.planner.plan import Plan
from asyncdiff.schedule import Schedule, build_schedule
from asyncdiff.simulation import Machine, Timeline
from asyncdiff.simulation import simulate as simulate_schedule


def simulate(
    plan: Plan, machine: Machine, *, num_steps: int = 50, driver_seconds: float | None = None
) -> Timeline:
    """The simulated timeline of a run of `num_steps` steps by a plan, from the seconds and bytes it predicts.

    Groups are simulated one by one, and a step takes as long as in the slowest of them. With
    `guidance_refresh`, both halves of guidance take turns, each as long as the plan's seconds say for one of
    them, also where one device evaluates both at once. `driver_seconds`: the
    pipeline's own work per step, None for what the plan was made with. Raises `ConfigurationError` where the
    plan has no predictions or the machine another number of devices.
    """
    if plan.predictions is None:
        raise ConfigurationError("The plan has no predictions to simulate with. Let it be made from a graph.")
    if len(machine.device_speeds) != plan.num_workers:
        raise ConfigurationError(
            f"The plan has {plan.num_workers} workers, but the machine {len(machine.device_speeds)} devices."
        )
    of_groups = [
        _simulate_group(plan, machine, group, num_steps, driver_seconds) for group in range(plan.groups)
    ]
    return _side_by_side(of_groups, plan.settings.group_size)


def _simulate_group(
    plan: Plan, machine: Machine, group: int, num_steps: int, driver_seconds: float | None
) -> Timeline:
    """One group; the driver, rank 0, computes in the first only."""
    assert plan.predictions is not None
    count = plan.settings.group_size
    speeds = machine.device_speeds[group * count : (group + 1) * count]
    if group > 0:
        speeds = (machine.device_speeds[0], *speeds)
    if plan.groups > 1:  # devices have busy neighbours in steps in order too
        speeds = tuple(speed * machine.busy_speed for speed in speeds)
        machine = replace(machine, busy_speed=1.0)
    transfer_bytes = {(producer, reader): size for producer, reader, size in plan.predictions.crossing_bytes}
    return simulate_schedule(
        schedule_of(plan, num_steps, driver_computes=group == 0),
        replace(machine, device_speeds=speeds),
        segment_seconds=plan.predictions.segment_seconds,
        transfer_bytes=transfer_bytes,
        fresh_leads={(producer, reader): lead_s for producer, reader, lead_s in plan.predictions.fresh_leads},
        prediction_bytes=plan.predictions.prediction_bytes,
        driver_seconds=plan.predictions.driver_seconds if driver_seconds is None else driver_seconds,
        # A timestep on another device cannot be looked at without waiting: nobody is told of it in advance.
        latents_stages=plan.predictions.latents_stages if plan.devices[0] == "cpu" else None,
        second=schedule_of(plan, num_steps, is_left_out=True) if plan.guidance_refresh > 1 else None,
    )


def _side_by_side(timelines: Sequence[Timeline], size: int) -> Timeline:
    """One timeline of all groups; the driver's row is that of the first."""
    spans = list(timelines[0].spans)
    for group, timeline in enumerate(timelines[1:], start=1):
        spans += [
            replace(span, rank=group * size + span.rank - 1) for span in timeline.spans if span.rank > 0
        ]
    steps = tuple(max(seconds) for seconds in zip(*(each.step_seconds for each in timelines), strict=True))
    total_s = max(sum(steps), *(timeline.total_s for timeline in timelines))
    return Timeline(tuple(sorted(spans, key=lambda span: (span.start_s, span.rank))), total_s, steps)


def schedule_of(
    plan: Plan, num_steps: int, *, driver_computes: bool = True, is_left_out: bool = False
) -> Schedule:
    """The schedule of a run of `num_steps` steps by a plan that has predictions, of its first group or (where
    not `driver_computes`) of another. `is_left_out`: of the half of guidance that only some steps evaluate.
    """
    assert plan.predictions is not None
    return build_schedule(
        kind=plan.kind,
        num_stages=plan.num_stages,
        stride=plan.stride,
        warmup_steps=plan.warmup_steps,
        num_steps=num_steps,
        time_shift=plan.time_shift,
        forecast=plan.forecast,
        freshness=plan.freshness,
        crossings=[(producer, reader) for producer, reader, _ in plan.predictions.crossing_bytes],
        fresh_crossings=[(producer, reader) for producer, reader, _ in plan.predictions.fresh_leads],
        driver_computes=driver_computes,
        refresh_every=plan.guidance_refresh if is_left_out else 1,
    )

"""How long a plan is expected to take on a machine."""

from __future__ import annotations

from asyncdiff.errors import ConfigurationError
from asyncdiff.planner.plan import Plan
from asyncdiff.schedule import Schedule, build_schedule
from asyncdiff.simulation import Machine, Timeline
from asyncdiff.simulation import simulate as simulate_schedule


def simulate(
    plan: Plan, machine: Machine, *, num_steps: int = 50, driver_seconds: float | None = None
) -> Timeline:
    """The simulated timeline of a run of `num_steps` steps by a plan, from the seconds and bytes it predicts.

    `driver_seconds`: the pipeline's own work per step, None for what the plan was made with. Raises
    `ConfigurationError` where the plan has no predictions or the machine another number of devices.
    """
    if plan.predictions is None:
        raise ConfigurationError("The plan has no predictions to simulate with. Let it be made from a graph.")
    transfer_bytes = {(producer, reader): size for producer, reader, size in plan.predictions.crossing_bytes}
    return simulate_schedule(
        schedule_of(plan, num_steps),
        machine,
        segment_seconds=plan.predictions.segment_seconds,
        transfer_bytes=transfer_bytes,
        fresh_leads={(producer, reader): lead_s for producer, reader, lead_s in plan.predictions.fresh_leads},
        prediction_bytes=plan.predictions.prediction_bytes,
        driver_seconds=plan.predictions.driver_seconds if driver_seconds is None else driver_seconds,
        # A timestep on another device cannot be looked at without waiting: nobody is told of it in advance.
        latents_stages=plan.predictions.latents_stages if plan.devices[0] == "cpu" else None,
    )


def schedule_of(plan: Plan, num_steps: int) -> Schedule:
    """The schedule of a run of `num_steps` steps by a plan that has predictions."""
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
    )

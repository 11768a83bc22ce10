"""Every way to use a number of devices, what each is predicted to bring, and which to take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from asyncdiff.errors import ConfigurationError
from asyncdiff.planner.controlnet import ControlNetCost, step_seconds
from asyncdiff.planner.plan import Plan
from asyncdiff.planner.timing import schedule_of, simulate
from asyncdiff.schedule import staleness
from asyncdiff.simulation import Machine

# Of 3 stages with stride 2: as far as the bundled models were measured to stay closer to the original than
# the published method does with 2 stages (docs/fidelity.md).
USUAL_STALENESS = 5

# Less than predictions are off by.
_AS_FAST = 0.005


@dataclass(frozen=True)
class Candidate:
    """A plan and what a run of it is predicted to be.

    `total_s`: of a run on the machine it was predicted for. `speedup`: over one device that does everything
    in order. `staleness`: the most steps by which a prediction is older than the latents it rests on;
    `read_staleness`: the same of the states that the predicting stage reads. `bytes_per_step`: what all
    devices send in a steady step, states and predictions. `controlnet`: as `parallelize` takes it; unless
    "serial" a device beside those of the plan is the ControlNet's.
    """

    plan: Plan
    total_s: float
    speedup: float
    staleness: int
    read_staleness: int
    bytes_per_step: float
    controlnet: str = "serial"

    @property
    def num_devices(self) -> int:
        return self.plan.num_workers + (self.controlnet != "serial")

    @property
    def weight_bytes(self) -> tuple[int, ...]:
        """What each stage's device holds of the denoiser's weights."""
        assert self.plan.predictions is not None
        return self.plan.predictions.parameter_bytes


@dataclass(frozen=True)
class Objective:
    """The fastest of those within the limits: `max_staleness` in steps, `max_memory_bytes` of weights per
    device; None for any."""

    max_staleness: int | None = None
    max_memory_bytes: float | None = None

    def allows(self, candidate: Candidate) -> bool:
        return self.is_fresh_enough(candidate) and self.is_small_enough(candidate)

    def is_fresh_enough(self, candidate: Candidate) -> bool:
        return self.max_staleness is None or candidate.staleness <= self.max_staleness

    def is_small_enough(self, candidate: Candidate) -> bool:
        return self.max_memory_bytes is None or max(candidate.weight_bytes) <= self.max_memory_bytes


def list_candidates(
    make_plan: Callable[[int, int, int, int], Plan],
    machine: Machine,
    num_steps: int,
    warmup_steps: Sequence[int],
    guidance_refreshes: Sequence[int] = (),
    controlnet: ControlNetCandidates | None = None,
) -> tuple[Candidate, ...]:
    """Every number of stages and stride that takes at most the machine's devices, with each warm-up; of as
    many devices first those in two groups that share the batch, and with a `controlnet`, last, those in which
    one device is the ControlNet's; in the plans of `make_plan` it is the driver's own work.
    `guidance_refreshes`: after all these, with each of them every number of stages from one.

    `make_plan(num_stages, stride, groups, guidance_refresh)`: the best plan for the first
    `groups * (num_stages + stride - 1)` devices, or `ConfigurationError` where there is none (too few blocks,
    a batch that cannot be shared), which leaves it out. The first candidate is the whole denoiser on the
    first device, in order, which every other is compared with.
    """
    in_order = make_plan(1, 1, 1, 1)
    in_order_s = _seconds(in_order, machine, num_steps)
    found = [_candidate(in_order, in_order_s, in_order_s, num_steps)]

    def predicted(num_stages: int, stride: int, groups: int, guidance_refresh: int) -> Iterator[Candidate]:
        try:
            plan = make_plan(num_stages, stride, groups, guidance_refresh)
        except ConfigurationError:
            return
        # One stage with stride 1 that evaluates everything is always in order.
        is_stale = plan.settings.group_size > 1 or guidance_refresh > 1
        for number in warmup_steps if is_stale else warmup_steps[:1]:
            warmed = replace(plan, warmup_steps=number)
            total_s = _seconds(warmed, machine, num_steps)
            yield _candidate(warmed, total_s, in_order_s, num_steps)

    counts = range(1, len(machine.device_speeds) + 1)
    for count in counts[1:]:
        for division in _divisions(count, num_steps):
            found += predicted(*division, 1)
        if controlnet is not None:
            found += _beside_controlnet(controlnet, count, machine, num_steps, warmup_steps, in_order_s)
    for count in counts:
        for every in guidance_refreshes:
            found += predicted(count, 1, 1, every)
    return tuple(found)


@dataclass(frozen=True)
class ControlNetCandidates:
    """`make_plan` as `list_candidates` takes it, of the devices but the ControlNet's; `cost`: by the number
    of groups."""

    make_plan: Callable[[int, int, int], Plan]
    cost: Callable[[int], ControlNetCost]


def _beside_controlnet(
    controlnet: ControlNetCandidates,
    num_devices: int,
    machine: Machine,
    num_steps: int,
    warmup_steps: Sequence[int],
    in_order_s: float,
) -> Iterator[Candidate]:
    """The last of so many devices is the ControlNet's."""
    used = replace(machine, device_speeds=machine.device_speeds[:num_devices])
    for num_stages, stride, groups in _divisions(num_devices - 1, num_steps):
        try:
            plan = controlnet.make_plan(num_stages, stride, groups)
            cost = controlnet.cost(groups)
        except ConfigurationError:
            continue
        for how in ("overlap", "ahead"):
            is_always_in_order = plan.settings.group_size == 1 and how == "overlap"
            for number in warmup_steps[:1] if is_always_in_order else warmup_steps:
                warmed = replace(plan, warmup_steps=number)
                seconds = step_seconds(warmed, used, cost, ahead=how == "ahead", num_steps=num_steps)
                made = _candidate(warmed, sum(seconds), in_order_s, num_steps)
                yield replace(
                    made,
                    controlnet=how,
                    staleness=max(made.staleness, int(how == "ahead")),
                    bytes_per_step=made.bytes_per_step + cost.output_bytes,
                )


def choose_candidate(candidates: Iterable[Candidate], objective: Objective) -> Candidate:
    """The fastest within the objective's limits; of equally fast ones, the one with the fewest devices.

    `ConfigurationError` saying what is least possible, where nothing is within them.
    """
    everything = tuple(candidates)
    allowed = [candidate for candidate in everything if objective.allows(candidate)]
    if not allowed:
        raise ConfigurationError(_nothing_allowed(everything, objective))
    return min(allowed, key=lambda each: (each.total_s, each.num_devices, each.plan.warmup_steps))


def explain_choice(chosen: Candidate, candidates: Sequence[Candidate], objective: Objective) -> str:
    """One sentence: what it is, how exact, and what it was preferred to."""
    count = chosen.num_devices
    what = (
        f"{_title(chosen)} on {count} device{'s' * (count > 1)}, {chosen.speedup:.2f}x: {_exactness(chosen)}"
    )
    limits = "" if objective == Objective() else " within the limits"
    others = [each for each in candidates if each is not chosen and objective.allows(each)]
    if not others:
        return f"Chosen: {what}; nothing else is there{limits}."
    second = choose_candidate(others, objective)
    more = second.total_s / chosen.total_s - 1
    compared = f"takes {more:.0%} longer" if more >= _AS_FAST else "takes as long"
    return (
        f"Chosen: {what}; the fastest{limits}, the next one ({_title(second)} on {second.num_devices}, "
        f"{_exactness(second)}) {compared}."
    )


def _title(candidate: Candidate) -> str:
    plan, parts = candidate.plan, []
    if plan.groups > 1:
        parts.append(f"guidance split between {plan.groups} groups")
    if plan.guidance_refresh > 1:
        parts.append(f"guidance evaluated in full every {plan.guidance_refresh} steps")
    if plan.num_stages > 1 or not parts:
        parts.append(f"{plan.num_stages} stages" if plan.num_stages > 1 else "one stage")
    if plan.settings.stride > 1:
        parts.append(f"stride {plan.settings.stride}")
    if candidate.controlnet != "serial":
        parts.append(f'controlnet="{candidate.controlnet}"')
    return ", ".join(parts)


def _exactness(candidate: Candidate) -> str:
    age = max(candidate.staleness, candidate.read_staleness)
    if age > 0:
        return f"what it reads is up to {age} step{'s' * (age > 1)} old"
    return "exact" if candidate.plan.guidance_refresh == 1 else "only guidance is continued"


def _divisions(num_devices: int, num_steps: int) -> list[tuple[int, int, int]]:
    """(number of stages, stride, groups) that take so many devices: two groups first, then most stages."""
    return [
        (num_devices // groups - stride + 1, stride, groups)
        for groups in ((2, 1) if num_devices % 2 == 0 else (1,))
        for stride in range(1, min(num_devices // groups, num_steps) + 1)
    ]


def _seconds(plan: Plan, machine: Machine, num_steps: int) -> float:
    count = plan.num_workers
    used = replace(
        machine,
        device_speeds=machine.device_speeds[:count],
        busy_speed=machine.busy_speed if count > 1 else 1.0,
    )
    return simulate(plan, used, num_steps=num_steps).total_s


def _candidate(plan: Plan, total_s: float, in_order_s: float, num_steps: int) -> Candidate:
    ages = staleness(schedule_of(plan, num_steps))
    return Candidate(
        plan=plan,
        total_s=total_s,
        speedup=in_order_s / total_s,
        staleness=max(step.latents for step in ages),
        read_staleness=max(step.largest_read for step in ages),
        bytes_per_step=bytes_per_step(plan),
    )


def bytes_per_step(plan: Plan) -> float:
    """What all devices send in a steady step: the states that cross, and the predictions that the driver does
    not make itself (copy 0 of a nested split, or of a single stage, is the driver's in the first group)."""
    predictions = plan.predictions
    assert predictions is not None
    driver_predicts = plan.kind == "nested" or plan.num_stages == 1
    sent = plan.groups * plan.stride - driver_predicts
    crossing = plan.groups * predictions.crossing_bytes_per_step
    halves = 1 if plan.guidance_refresh == 1 else 1 + 1 / plan.guidance_refresh
    return halves * (crossing + predictions.prediction_bytes * sent / plan.stride)


def _nothing_allowed(candidates: Sequence[Candidate], objective: Objective) -> str:
    limits, least = [], []
    if objective.max_staleness is not None:
        limits.append(f"staleness {objective.max_staleness}")
        least.append(f"the least staleness is {min(each.staleness for each in candidates)}")
    if objective.max_memory_bytes is not None:
        limits.append(f"{objective.max_memory_bytes / 1e9:g} GB of weights per device")
        smallest = min(candidates, key=lambda each: max(each.weight_bytes))
        least.append(
            f"the least memory is {max(smallest.weight_bytes) / 1e9:.3g} GB (N={smallest.plan.num_stages}, "
            f"staleness {smallest.staleness})"
        )
    return (
        f"Nothing keeps within {' and '.join(limits)} on these devices: {', '.join(least)}. Allow more, or "
        "plan for more devices."
    )

"""What is remembered of a run between its denoiser calls: the schedule of each channel, and its timesteps."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from asyncdiff.config import Settings
from asyncdiff.errors import ConfigurationError
from asyncdiff.graph.wiring import Wiring
from asyncdiff.pipeline.analysis import Analysis
from asyncdiff.pipeline.course import Course
from asyncdiff.pipeline.noise_scheduler import scaled_inputs_of, timesteps_of
from asyncdiff.pipeline.runs import PlacedCall
from asyncdiff.pipeline.timesteps import input_scale, other_step_names, scaled_part, timestep_name
from asyncdiff.protocol.messages import Condition, LatentsScale
from asyncdiff.schedule import Round, Schedule, build_schedule
from asyncdiff.trace import Inputs
from asyncdiff.tracking import Position


@dataclass
class ChannelState:
    """One channel of a run: which schedule it follows since `schedule.first_step`, for which input structure.

    `settings`: what the schedule was built from. `arguments`: timestep argument of the denoiser by step;
    `foreseen`: of all steps to come, where latents are continued, and whether they are known (`is_sure`).
    `in_order`: the steps after warm-up that run in order. `is_refreshed`: it was begun so that some of its
    predictions are left out. `error`: the relative error of the forecasts, as far as the last round's
    predictions told; infinite before any has. `course`: what the inputs have been, where they are continued;
    `places`: the steps' places on it.
    """

    analysis: Analysis
    settings: Settings
    schedule: Schedule
    arguments: dict[int, Any] = field(default_factory=dict)
    foreseen: dict[int, Any] = field(default_factory=dict)
    is_sure: bool = False
    in_order: frozenset[int] = frozenset()
    is_refreshed: bool = False
    error: float = math.inf
    course: Course = field(default_factory=Course)
    places: dict[int, float] = field(default_factory=dict)

    @property
    def known_arguments(self) -> Mapping[int, Any]:
        """The timestep arguments of steps that were and, as far as they are foreseen, of those to come."""
        return ChainMap(self.arguments, self.foreseen)

    def follows(self, position: Position, analysis: Analysis) -> bool:
        """Whether its states are those of the previous step of this structure."""
        covers = self.schedule.first_step <= position.step < self.schedule.num_steps
        return self.analysis is analysis and covers and position.first_step <= self.schedule.first_step

    def copied(self) -> ChannelState:
        """A copy to try something with; what is changed of it leaves this one alone."""
        return replace(self, arguments=dict(self.arguments), course=self.course.copied())

    def note_inputs(self, call: PlacedCall, inputs: Inputs) -> None:
        """What a step is given; noted twice is noted once."""
        argument = timestep_argument(inputs)
        self.arguments[call.position.step] = (
            argument.clone() if isinstance(argument, torch.Tensor) else argument
        )
        if self.schedule.continues_latents:
            self.observe(call, inputs)

    def observe(self, call: PlacedCall, inputs: Inputs) -> None:
        """Note what the inputs are at the step of the call."""
        position, timesteps = call.position, timesteps_of(call.scheduler)
        if not self.places and position.placed and timesteps is not None and timesteps.dim() == 1:
            first = position.timestep_index - position.step
            self.places = {index - first: float(each) for index, each in enumerate(timesteps.tolist())}
        self.course.observe(
            self.place(position.step),
            inputs.tensors(),
            latents=inputs.latents,
            without=timestep_name(inputs.names),
        )

    def place(self, step: int) -> float:
        """Where a step lies on the course of the inputs: its timestep, over which they run most evenly."""
        return self.places.get(step, float(step))

    def run_in_order(self, step: int) -> None:
        """Run `step` in order, which no round has been started for. The states of the steps before it stay
        good: those of the last step have been sent to every worker that reads them a round later.
        """
        self.in_order |= {step}
        self._reschedule(self.schedule.first_step)

    def forecast_states(self, step: int) -> None:
        """Continue states instead of latents from `step` on, which no round has been started for."""
        self._follow(with_line(self.settings), step)

    def predict_all(self, step: int) -> None:
        """Leave no prediction out from `step` on, which no round has been started for."""
        self.is_refreshed = False
        self._follow(replace(self.settings, guidance_refresh=1), step)

    def _follow(self, settings: Settings, step: int) -> None:
        """Other settings from `step` on: as if they had been so from the beginning, if no round has worked
        ahead; else warm-up starts again."""
        self.settings = settings
        first = self.schedule.first_step
        has_worked_ahead = not all(self.schedule.round_of(before).in_order for before in range(first, step))
        self._reschedule(step if has_worked_ahead else first)

    def _reschedule(self, first_step: int) -> None:
        old = self.schedule
        self.schedule = schedule_for(
            old.kind,
            self.analysis.wiring,
            self.settings,
            first_step,
            old.num_steps,
            self.in_order,
            driver_computes=old.driver_computes,
        )

    @property
    def history_depth(self) -> int:
        """How many versions of a state later rounds may look at: those they read, and the two from which the
        error of a forecast is told."""
        return max(self.schedule.history_depth, 1 if self.settings.tolerance is None else 2)

    def note_error(self, step: int, error: float) -> None:
        """What came with the prediction for a step; of a round, the largest counts."""
        is_first = self.schedule.round_of(step).first_step == step
        self.error = error if is_first else max(self.error, error)


def schedule_for(
    kind: str,
    wiring: Wiring,
    settings: Settings,
    first_step: int,
    num_steps: int,
    in_order: frozenset[int] = frozenset(),
    *,
    driver_computes: bool = True,
) -> Schedule:
    """The schedule of the steps `first_step` to `num_steps - 1`, of which `in_order` run in order as those of
    warm-up do."""
    crossings, fresh_crossings = wiring.crossings, wiring.fresh_crossings
    return _schedule_for(
        kind, crossings, fresh_crossings, settings, first_step, num_steps, in_order, driver_computes
    )


@lru_cache(maxsize=64)
def _schedule_for(
    kind: str,
    crossings: tuple[tuple[int, int], ...],
    fresh_crossings: tuple[tuple[int, int], ...],
    settings: Settings,
    first_step: int,
    num_steps: int,
    in_order: frozenset[int],
    driver_computes: bool,
) -> Schedule:
    return build_schedule(
        kind=kind,
        num_stages=settings.num_stages,
        stride=settings.stride,
        warmup_steps=settings.warmup_steps,
        num_steps=num_steps,
        first_step=first_step,
        time_shift=settings.time_shift,
        forecast=settings.forecast,
        freshness=settings.freshness,
        crossings=crossings,
        fresh_crossings=fresh_crossings,
        in_order_steps=in_order,
        driver_computes=driver_computes,
        refresh_every=settings.guidance_refresh,
    )


def with_line(settings: Settings) -> Settings:
    """The settings for a run whose latents cannot be continued; no half of guidance is left out then."""
    return replace(settings, forecast="linear", guidance_refresh=1)


class Conditions:
    """Timesteps and scales for evaluations that are conditioned on another step than the call's own.

    Needed with time shift (the timestep of the step before), with stride > 1 and where latents are continued
    (those of steps to come). `settings`: those of the channel. `whole`: the call's inputs, of which `inputs`
    may be one part of the batch.
    """

    def __init__(self, settings: Settings, call: PlacedCall, inputs: Inputs, whole: Inputs) -> None:
        self._settings = settings
        self._call = call
        self._inputs = inputs
        self._whole = whole

    def observe(self) -> None:
        """Learn from the call how the timestep argument follows from the noise scheduler's timestep."""
        timesteps, argument = timesteps_of(self._call.scheduler), timestep_argument(self._inputs)
        if self._settings.stride > 1 and timesteps is not None and argument is not None:
            self._call.timesteps.observe(timesteps[self._call.position.timestep_index], argument)

    def can_foresee(self) -> bool:
        """Whether the inputs of steps to come are the latents continued and a timestep that can be told, from
        this call and those before."""
        timesteps, argument = timesteps_of(self._call.scheduler), timestep_argument(self._inputs)
        if not self._call.position.placed or timesteps is None or argument is None:
            return False
        if other_step_names(self._inputs.names):
            return False
        try:
            self._call.timesteps.observe(timesteps[self._call.position.timestep_index], argument)
        except ConfigurationError:
            return False
        return True

    def foreseen(self, num_steps: int) -> tuple[dict[int, Any], bool]:
        """The timestep arguments of steps to come, and whether all are known: else some may be rounded in
        another way or missing. It waits for the device that holds them."""
        timesteps, like = timesteps_of(self._call.scheduler), timestep_argument(self._inputs)
        assert timesteps is not None
        found = {
            step: self._call.timesteps.map.likely_argument_for(timesteps[self._index(step)], like)
            for step in range(self._call.position.step + 1, num_steps)
        }
        arguments = {step: argument for step, (argument, _) in found.items() if argument is not None}
        return arguments, all(is_sure for _, is_sure in found.values())

    def for_round(self, round_: Round, arguments: Mapping[int, Any]) -> dict[int, Condition] | None:
        """By condition step, what replaces the call's own timestep and scale; None where it is not known yet.

        `arguments`: timestep argument of the denoiser at steps that are known.
        """
        found: dict[int, Condition] = {}
        shift = 1 if self._settings.time_shift and not round_.in_order else 0
        for condition_step in round_.condition_steps:
            scale = None if self._settings.forecast == "latents" else self._scale(condition_step + shift)
            if condition_step == self._call.position.step and scale is None:
                continue
            timestep = (
                arguments[condition_step] if condition_step in arguments else self._ahead(condition_step)
            )
            if timestep is None:
                return None
            found[condition_step] = Condition(timestep, scale)
        return found

    def _ahead(self, step: int) -> Any:
        self._refuse_unknown_inputs()
        timesteps = timesteps_of(self._call.scheduler)
        assert timesteps is not None
        return self._call.timesteps.map.argument_for(
            timesteps[self._index(step)], like=timestep_argument(self._inputs)
        )

    def _refuse_unknown_inputs(self) -> None:
        others = other_step_names(self._inputs.names)
        if others or timestep_argument(self._inputs) is None:
            what = f"also varies {', '.join(others)} by step" if others else "takes no timestep that is known"
            raise ConfigurationError(
                f"stride={self._settings.stride} needs the denoiser's inputs of later steps, but this "
                f"denoiser {what}. Use stride=1."
            )

    def _scale(self, step: int) -> LatentsScale | None:
        """By how much the latents of the call must be scaled for an evaluation that belongs to `step`."""
        scheduler, position = self._call.scheduler, self._call.position
        if step == position.step:
            return None
        own, other = (input_scale(scheduler, self._index(index)) for index in (position.step, step))
        if own is None or other is None:
            raise self._refusal("does not tell how it scales the denoiser's input at later steps")
        if own == other:
            return None
        part = scaled_part(self._whole.tensors()[self._whole.latents], scaled_inputs_of(scheduler))
        if part is None:
            raise self._refusal(
                "scales the denoiser's input by step, and what the denoiser was given is not what its "
                "scale_model_input returned"
            )
        dim, length = part
        own_length = self._inputs.tensors()[self._inputs.latents].shape[dim]
        return LatentsScale(other / own, dim, min(length, own_length))

    def _refusal(self, why: str) -> ConfigurationError:
        name = type(self._call.scheduler).__name__
        return ConfigurationError(
            f"stride={self._settings.stride} needs the latents rescaled for later steps, but {name} {why}. "
            "Use stride=1, or a noise scheduler that does not scale, such as DDIMScheduler."
        )

    def _index(self, step: int) -> int:
        """The step's place in the noise scheduler's timesteps."""
        return self._call.position.timestep_index + step - self._call.position.step


def timestep_argument(inputs: Inputs) -> Any:
    """The denoiser's timestep: a tensor or a number; None where it has none."""
    name = timestep_name(inputs.names)
    return None if name is None else inputs.leaves[inputs.names.index(name)]

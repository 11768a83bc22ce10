"""What stands in for the denoiser's forward: every call becomes a step of the schedule.

The pipeline runs as it is; only this object knows that the denoiser is elsewhere. It finds out which run, step and
channel a call belongs to, analyses inputs of a new structure, dispatches rounds and returns predictions.
"""

from __future__ import annotations

import inspect
import itertools
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from asyncdiff.config import Settings
from asyncdiff.errors import ConfigurationError, ParallelizedError, WeightsLostError
from asyncdiff.graph import Partition
from asyncdiff.pipeline.analysis import (
    Analysis,
    PartitionRequest,
    analyse,
    analyse_again,
    first_plan,
    record_call,
)
from asyncdiff.pipeline.guards import guard_names, install_guards, remove_guards
from asyncdiff.pipeline.noise_scheduler import is_watched, new_tracker, unwatch, watch
from asyncdiff.pipeline.report import CallRecord, RunReport, build_report
from asyncdiff.pipeline.run_state import (
    ChannelState,
    Conditions,
    refuse_scaled_conditions,
    schedule_for,
    timestep_argument,
)
from asyncdiff.pipeline.scheduler_lookup import calling_pipeline
from asyncdiff.pipeline.timesteps import timestep_name
from asyncdiff.planner import Plan
from asyncdiff.runtime.executor import Executor, RoundCall
from asyncdiff.tracking import Position, Tracker
from asyncdiff.trace import Inputs, flatten_inputs
from asyncdiff.weights import Skeleton, dump_skeleton

_SHORT_RUN_MARGIN = 3


class DenoiserEntry:
    """The instance-level forward of a parallelized denoiser."""

    def __init__(self, installation: Installation, forward: Callable[..., Any]) -> None:
        self._installation = installation
        self.__signature__ = inspect.signature(forward)
        self.__doc__ = forward.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._installation.call(args, kwargs)


class Installation:
    """One denoiser divided over devices, serving every pipeline that shares it."""

    def __init__(
        self,
        pipe: Any,
        denoiser: nn.Module,
        executor: Executor,
        settings: Settings,
        devices: tuple[str, ...],
        *,
        partition: PartitionRequest,
        plan: Plan | None,
        threads: int | None,
        ships: bool,
    ) -> None:
        self.pipe = pipe
        self.denoiser = denoiser
        self.executor = executor
        self.settings = settings
        self.plan = plan
        self._devices = devices
        self._partition = partition
        self._threads = threads
        self._ships = ships
        self._device = torch.device(devices[0])
        self._dtype = next(denoiser.parameters()).dtype
        self._forward = type(denoiser).forward
        self._forward_before = vars(denoiser).get("forward")
        self._lock = threading.RLock()
        self._skeleton: Skeleton | None = None
        self._installed: Skeleton | None = None
        self._owners: Partition | None = None
        self._analyses: dict[Any, Analysis] = {}
        self._analysis_numbers = itertools.count()
        self._trackers: dict[int, tuple[Any, Tracker]] = {}
        self._run_numbers: dict[tuple[int, int], int] = {}
        self._next_run = itertools.count()
        self._ended_runs: list[int] = []
        self._channels: dict[tuple[int, Any], ChannelState] = {}
        self._conditions: dict[int, Conditions] = {}
        self._warned: set[str] = set()
        self._calls: list[CallRecord] = []
        self._last_run: int | None = None
        self._context: list[str] = []
        self._removed = False

    # -- in and out --------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the entry in the place of the denoiser's forward, and listen to the noise scheduler."""
        vars(self.denoiser)["forward"] = DenoiserEntry(self, self.denoiser.forward)
        if hasattr(type(self.denoiser), "cache_context"):
            vars(self.denoiser)["cache_context"] = _NamedContext(self._context, self.denoiser.cache_context)
        install_guards(self.pipe, self.denoiser, self._device, self._dtype)
        scheduler = getattr(self.pipe, "scheduler", None)
        if scheduler is not None:
            self._tracker_of(scheduler, run_is_open=False)

    def remove(self) -> None:
        """Give the pipeline back as it was; `WeightsLostError` names what only a dead worker held."""
        with self._lock:
            if self._removed:
                return
            self._removed = True
            for scheduler, tracker in self._trackers.values():
                unwatch(scheduler, tracker)
            self._trackers.clear()
            remove_guards(self.pipe, self.denoiser)
            vars(self.denoiser).pop("cache_context", None)
            vars(self.denoiser).pop("forward", None)
            if self._forward_before is not None:
                vars(self.denoiser)["forward"] = self._forward_before
            try:
                lost = self.executor.restore(self.denoiser)
            finally:
                self.executor.close()
        if lost:
            raise WeightsLostError(
                f"{len(lost)} tensors of the denoiser were held by a worker that is gone, and no file that they "
                f"came from gives them back: {', '.join(lost[:5])}{' ...' * (len(lost) > 5)}. Load the pipeline again."
            )

    # -- a denoiser call ---------------------------------------------------------------------------------------

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the denoiser's forward would have returned, from the stages."""
        start_s = time.perf_counter()
        with self._lock, _intra_op_threads(self._threads), torch.no_grad():
            inputs = flatten_inputs(self._forward, args, kwargs)
            self._refuse_gradients(inputs)
            position, scheduler = self._place(inputs)
            run = self._run_number(position, scheduler)
            analysis = self._analysis(inputs)
            leaves = self._predict(run, position, scheduler, inputs, analysis)
            output = analysis.output.rebuild(leaves)
            self._note_call(run, position, start_s)
            return output

    def _predict(
        self, run: int, position: Position, scheduler: Any, inputs: Inputs, analysis: Analysis
    ) -> list[torch.Tensor]:
        state = self._channel_state(run, position, analysis)
        argument = timestep_argument(inputs)
        state.arguments[position.step] = argument.clone() if isinstance(argument, torch.Tensor) else argument
        if state.schedule.round_of(position.step).first_step == position.step:
            self._start_round(run, position, scheduler, inputs, state)
        return self.executor.prediction(run, position.channel, position.step)

    def _start_round(
        self, run: int, position: Position, scheduler: Any, inputs: Inputs, state: ChannelState
    ) -> None:
        conditions_of_run = self._conditions.setdefault(run, self._new_conditions(scheduler))
        if position.placed:
            conditions_of_run.observe(scheduler, position, inputs)
        round_ = state.schedule.round_of(position.step)
        conditions = conditions_of_run.for_round(round_, scheduler, position, inputs, state.arguments)
        if conditions is None:  # the timesteps to come are not known yet: learn from another step in order
            state.schedule = self._schedule(position, state.analysis)
            round_, conditions = state.schedule.round_of(position.step), {}
        refuse_scaled_conditions(conditions, inputs, state.analysis, self.settings.stride)
        ended, self._ended_runs = tuple(self._ended_runs), []
        self.executor.run_round(
            RoundCall(
                run=run,
                channel=position.channel,
                key=state.analysis.number,
                round=round_,
                tensors=inputs.tensors(),
                floats=inputs.floats(),
                history_depth=2 if self.settings.forecast == "linear" else 1,
                conditions=conditions,
                timestep_name=timestep_name(inputs.names),
                latents_name=inputs.latents,
                ended_runs=ended,
            )
        )

    def _channel_state(self, run: int, position: Position, analysis: Analysis) -> ChannelState:
        state = self._channels.get((run, position.channel))
        if state is None or not state.follows(position, analysis):
            state = ChannelState(analysis, self._schedule(position, analysis))
            self._channels[run, position.channel] = state
        return state

    def _schedule(self, position: Position, analysis: Analysis) -> Any:
        """From this step to the end of the run; a call that cannot be placed is a run of one step, in order."""
        num_steps = position.num_steps if position.placed and position.num_steps else position.step + 1
        return schedule_for(
            analysis.partition.kind, analysis.crossings, self.settings, position.step, num_steps
        )

    # -- where a call stands -----------------------------------------------------------------------------------

    def _place(self, inputs: Inputs) -> tuple[Position, Any]:
        pipe = calling_pipeline(self.denoiser) or self.pipe
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is None:
            position = Position(-1, 0, 0, None, 0, 0, False, False, "the pipeline has no noise scheduler")
        else:
            tracker = self._tracker_of(scheduler, run_is_open=True)
            context = self._context[-1] if self._context else None
            position = tracker.place(context, hint=timestep_argument(inputs))
        if position.placed and position.num_steps is None:
            position = replace(position, reason="the noise scheduler does not say how many steps the run has")
        if not position.placed:
            self._warn(
                "unplaced", f"A denoiser call runs in order on the devices, without gain: {position.reason}."
            )
        return position, scheduler

    def _tracker_of(self, scheduler: Any, *, run_is_open: bool) -> Tracker:
        if id(scheduler) not in self._trackers:
            self._trackers[id(scheduler)] = (scheduler, new_tracker())
        tracker = self._trackers[id(scheduler)][1]
        if not is_watched(scheduler, tracker):
            watch(scheduler, tracker, run_is_open=run_is_open)
        return tracker

    def _run_number(self, position: Position, scheduler: Any) -> int:
        """Runs of several noise schedulers may alternate: each has a number of its own."""
        if not position.placed:
            run = next(self._next_run)
            self._end_runs([run])
            return run
        key = (id(scheduler), position.run)
        if key not in self._run_numbers:
            self._end_runs([run for (owner, _), run in self._run_numbers.items() if owner == id(scheduler)])
            self._run_numbers = {k: run for k, run in self._run_numbers.items() if k[0] != id(scheduler)}
            self._run_numbers[key] = next(self._next_run)
            self._begin_run(position)
            self._follow_changes()
        return self._run_numbers[key]

    def _begin_run(self, position: Position) -> None:
        assert position.num_steps is not None
        if self.settings.stride > position.num_steps:
            raise ConfigurationError(
                f"stride={self.settings.stride} is longer than the run of {position.num_steps} steps. Use "
                f"stride={position.num_steps} or less, or more steps."
            )
        if position.num_steps <= self.settings.warmup_steps + _SHORT_RUN_MARGIN:
            self._warn(
                "short",
                f"A run of {position.num_steps} steps with warmup_steps={self.settings.warmup_steps} is too short to "
                f"gain from asynchronous denoising.",
            )
        self._calls = []

    def _end_runs(self, runs: list[int]) -> None:
        self._ended_runs.extend(runs)
        self._channels = {key: state for key, state in self._channels.items() if key[0] not in runs}
        self._conditions = {run: known for run, known in self._conditions.items() if run not in runs}

    def _new_conditions(self, scheduler: Any) -> Conditions:
        config = getattr(scheduler, "config", {})
        scale = getattr(getattr(self.denoiser, "config", None), "timestep_scale", None)
        return Conditions(
            self.settings, int(config.get("num_train_timesteps", 1000)), () if scale is None else (float(scale),)
        )

    # -- structures --------------------------------------------------------------------------------------------

    def _analysis(self, inputs: Inputs) -> Analysis:
        key = inputs.key()
        if key not in self._analyses:
            self._analyses[key] = self._analyse(inputs)
        return self._analyses[key]

    def _analyse(self, inputs: Inputs) -> Analysis:
        """The first call settles the plan and ships the weights; later ones keep every block where it is."""
        weights_at_hand = self._owners is None or not self._ships
        self._skeleton = self._skeleton or self._dump()
        recording = record_call(
            self.denoiser, self._skeleton, inputs, self._device, weights_at_hand=weights_at_hand
        )
        number = next(self._analysis_numbers)
        if self._owners is None:
            self.plan = self.plan or first_plan(
                recording,
                self.settings,
                self._devices,
                self._partition,
                dtype=self._dtype,
                threads_per_device=self._threads,
            )
            analysis = analyse(number, recording, self.plan)
            self._owners = analysis.partition
        else:
            assert self.plan is not None
            analysis = analyse_again(number, recording, self.plan, self._owners)
        if self._skeleton is not self._installed:
            self._install_weights(analysis)
            self._installed = self._skeleton
        self.executor.prepare(number, analysis.specs, analysis.wiring)
        return analysis

    def _install_weights(self, analysis: Analysis) -> None:
        assert self._skeleton is not None
        replicated = analysis.partition.replicated_stage
        stages = range(self.settings.num_stages)
        rank_stages = (*stages, *(replicated for _ in range(self.settings.stride - 1)))
        self.executor.install(
            self.denoiser,
            self._skeleton,
            rank_stages,
            {stage: spec.tensors for stage, spec in analysis.specs.items()},
        )

    def _follow_changes(self) -> None:
        """What was changed on the denoiser since the last run (processors, FreeU, adapter scales) is passed on.

        Changed weights cannot be: they are elsewhere.
        """
        if self._skeleton is None:
            return
        skeleton = self._dump()
        if skeleton.payload == self._skeleton.payload:
            return
        if skeleton.specs != self._skeleton.specs:
            changed = sorted(skeleton.specs.keys() ^ self._skeleton.specs.keys())
            raise ParallelizedError(
                f"The denoiser's weights were changed after parallelize ({', '.join(changed[:3]) or 'other shapes'}"
                f"{' ...' * (len(changed) > 3)}). Call handle.remove() first, change them, then parallelize again."
            )
        self._skeleton = skeleton
        self._analyses.clear()

    def _dump(self) -> Skeleton:
        return dump_skeleton(
            self.denoiser, omit=("forward", "cache_context", *guard_names()), allow_main=not self._ships
        )

    # -- the rest ----------------------------------------------------------------------------------------------

    def set(self, warmup_steps: int) -> None:
        """Change how many steps run in order, from the next run on."""
        with self._lock:
            self.settings = replace(self.settings, warmup_steps=warmup_steps)
            if self.plan is not None:
                self.plan = replace(self.plan, warmup_steps=warmup_steps)

    def report(self) -> RunReport:
        """The last run; `ParallelizedError` before the first one."""
        with self._lock:
            if self._last_run is None or self.plan is None:
                raise ParallelizedError("There is no run to report yet: call the pipeline first.")
            return build_report(self._calls, self.executor.reports(self._last_run), self.plan)

    def _note_call(self, run: int, position: Position, start_s: float) -> None:
        self._last_run = run
        self._calls.append(CallRecord(position.step, position.channel, start_s, time.perf_counter()))

    def _refuse_gradients(self, inputs: Inputs) -> None:
        if any(tensor.requires_grad for tensor in inputs.tensors().values()):
            raise ParallelizedError(
                "Gradients through the denoiser are not possible while it is divided over devices. Call "
                "handle.remove() first."
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=6)


class _NamedContext:
    """Wraps diffusers' `cache_context` to know the name of the call that is being made."""

    def __init__(self, names: list[str], original: Callable[[str], Any]) -> None:
        self._names = names
        self._original = original

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._names.append(name)
        try:
            with self._original(name):
                yield
        finally:
            self._names.pop()


@contextmanager
def _intra_op_threads(count: int | None) -> Iterator[None]:
    """The plan's number of threads while the denoiser runs; text encoders and VAE keep theirs."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

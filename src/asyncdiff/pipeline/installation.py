"""What stands in for the denoiser's forward: every call becomes a step of the schedule.

The pipeline runs as it is; only this object knows that the denoiser is elsewhere. It finds out which run,
step and channel a call belongs to, analyses inputs of a new structure, dispatches rounds and returns
predictions.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from asyncdiff.config import MAX_GROUPS, Settings
from asyncdiff.errors import ConfigurationError, ParallelizedError, WeightsLostError
from asyncdiff.guidance import PartsMemory, SharedBatch, batch_size
from asyncdiff.pipeline.analysis import Analysis
from asyncdiff.pipeline.entry import ContextNames, DenoiserEntry, NamedContext
from asyncdiff.pipeline.forward import current_forward, put_forward
from asyncdiff.pipeline.guards import install_guards, remove_guards
from asyncdiff.pipeline.next_round import Seen, following_round, in_advance, seen
from asyncdiff.pipeline.noise_scheduler import scaled_inputs_of
from asyncdiff.pipeline.partition_request import PartitionRequest
from asyncdiff.pipeline.refresh import FirstCall, GuidedRun, Halves
from asyncdiff.pipeline.report import CallRecord, RunRecord
from asyncdiff.pipeline.run_state import (
    ChannelState,
    Conditions,
    schedule_for,
    timestep_argument,
    with_line,
)
from asyncdiff.pipeline.runs import PlacedCall, Runs
from asyncdiff.pipeline.scheduler_lookup import calling_pipeline, is_guided
from asyncdiff.pipeline.structures import Structures
from asyncdiff.pipeline.timesteps import scaled_part, timestep_name
from asyncdiff.pipeline.turns import Turns
from asyncdiff.pipeline.user_warning import warn_user
from asyncdiff.planner import Plan
from asyncdiff.protocol.messages import RoundInfo
from asyncdiff.runtime.executor import Executor, RoundCall
from asyncdiff.runtime.groups import Groups
from asyncdiff.runtime.interrupts import interrupts_deferrable
from asyncdiff.schedule import Schedule
from asyncdiff.trace import Inputs, flatten_inputs
from asyncdiff.trace.tensors import no_gradients
from asyncdiff.tracking import Position

_SHORT_RUN_MARGIN = 3
# With fewer (k = 4 at 20 steps) the bundled U-Net's pictures are below 30 dB at guidance 7.5; with 9 (k = 2)
# above 40 dB (docs/fidelity.md).
_FEW_REFRESHES = 8


@dataclass(frozen=True)
class Piece:
    """What one group has to do of a call: all of it, or a part of its batch."""

    group: int
    channel: Any
    inputs: Inputs
    state: ChannelState


@dataclass(frozen=True)
class TwoGroups:
    """The same devices as two groups, which are not there before `open` is called."""

    num_stages: int
    open: Callable[[], Groups]


class Installation:
    """One denoiser divided over devices, serving every pipeline that shares it.

    `name`: what `pipe` calls it. `lock`: of all denoisers that share workers, which take turns
    (`WorkerUsers`). `two_groups`: what the first call may choose in the place of `groups`, which is one then.
    """

    def __init__(
        self,
        pipe: Any,
        name: str,
        denoiser: nn.Module,
        groups: Groups,
        settings: Settings,
        devices: tuple[str, ...],
        lock: threading.RLock,
        *,
        partition: PartitionRequest,
        plan: Plan | None,
        threads: int | None,
        ships: bool,
        two_groups: TwoGroups | None = None,
    ) -> None:
        self.pipe = pipe
        self.name = name
        self.denoiser = denoiser
        self.groups = groups
        self._two_groups = two_groups
        self._chose_groups = False
        self.settings = settings
        self.structures = Structures(
            pipe, name, denoiser, devices, partition=partition, plan=plan, threads=threads, ships=ships
        )
        self._threads = threads
        self.device = torch.device(devices[0])
        self.dtype = next(denoiser.parameters()).dtype
        self._forward = type(denoiser).forward
        self._forward_before = current_forward(denoiser)
        self._lock = lock
        scale = getattr(getattr(denoiser, "config", None), "timestep_scale", None)
        self._runs = Runs(name, () if scale is None else (float(scale),))
        self._parts_memory: dict[tuple[int, Any], PartsMemory] = {}
        self._turns = Turns()
        self._guided: dict[int, GuidedRun] = {}
        self._channels: dict[tuple[int, Any], ChannelState] = {}
        self._warned: set[str] = set()
        self._last_channel: tuple[int, Any] = (-1, None)
        self._seen: dict[Any, list[Seen]] = {}
        self._calls: dict[int, list[CallRecord]] = {}
        self.last_call: tuple[float, int] | None = None  # when it ended, and its run
        self._context = ContextNames()
        self._is_changed = False
        self._removed = False

    # -- in and out ------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the entry in the place of the denoiser's forward, and listen to the noise scheduler."""
        put_forward(self.denoiser, DenoiserEntry(self.call, self._forward_before))
        if hasattr(type(self.denoiser), "cache_context"):
            original = getattr(self.denoiser, "cache_context")  # noqa: B009 (mypy takes it for a submodule)
            vars(self.denoiser)["cache_context"] = NamedContext(self._context, original)
        self._install_guards()
        self._runs.listen(self.pipe)

    def remove(self) -> None:
        """Give the pipeline back as it was; `WeightsLostError` names what only a dead worker held."""
        with self._lock:
            if self._removed:
                return
            self._removed = True
            self._runs.close()
            remove_guards(self.denoiser)
            vars(self.denoiser).pop("cache_context", None)
            put_forward(self.denoiser, self._forward_before)
            try:
                self._bring_home()
            finally:
                self.groups.close()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """All weights in this process and no guards, for something that needs or changes them.

        The next denoiser call, also of a run that is under way, ships them again: every block goes where it
        was.
        """
        with self._lock:
            self._bring_home()
            self.structures.forget_weights()
            remove_guards(self.denoiser)
            try:
                yield
            finally:
                self.structures.note_weights()
                self._install_guards()

    def note_change(self) -> None:
        """The denoiser computes in another way from the next call on."""
        self._is_changed = True

    @property
    def plan(self) -> Plan | None:
        """What runs where; None before the first call, unless it was given."""
        return self.structures.plan

    @property
    def executor(self) -> Executor:
        """Of the group that the driver computes in."""
        return self.groups.first

    def _analysis(self, inputs: Inputs) -> Analysis:
        return self.structures.analysis(inputs, self.settings, self.groups)

    def _install_guards(self) -> None:
        install_guards(self.denoiser, self.device, self.dtype, self)

    def _bring_home(self) -> None:
        lost = self.groups.restore(self.denoiser)
        if lost:
            raise WeightsLostError(
                f"{len(lost)} tensors of {self.name} were held by a worker that is gone, and no file that "
                f"they came from gives them back: {', '.join(lost[:5])}{' ...' * (len(lost) > 5)}. Load the "
                "pipeline again."
            )

    # -- a denoiser call -------------------------------------------------------------------------------------

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the denoiser's forward would have returned, from the stages."""
        start_s = time.perf_counter()
        with self._lock, interrupts_deferrable(), _IntraOpThreads(self._threads), no_gradients():
            inputs = flatten_inputs(self._forward, args, kwargs)
            self._refuse_gradients(inputs)
            self._decide_groups(inputs)
            call = self._place(inputs)
            if ended := self._runs.take_ended():
                self._end_runs(ended)
            halves = self._halves(call, inputs)
            if halves is None or halves.shared is None:
                parts = self._parts(call, inputs)
                pieces = self._pieces(call, parts, [self._analysis(part) for part in parts], halves)
                leaves = self._whole(call, inputs, pieces, halves)
            else:
                pieces, leaves = self._half_by_half(call, inputs, halves)
            output = pieces[0].state.analysis.output.rebuild(leaves)
            self._note_call(call, pieces, start_s)
            return output

    def _whole(
        self, call: PlacedCall, whole: Inputs, pieces: Sequence[Piece], halves: Halves | None
    ) -> list[torch.Tensor]:
        """The tensor leaves of the prediction, of all parts of the batch one after the other. `halves`: of a
        second call."""
        of_parts = self._predict(call, whole, pieces)
        guided = self._guided.get(call.run)
        if halves is not None and guided is not None:
            first, step = guided.first_call(call), call.position.step
            assert first is not None
            if not of_parts:
                return halves.left_out(step, first.leaves)
            halves.observe(step, first.leaves, of_parts[0])
        if guided is not None and call.position.new_step:
            guided.note_first_call(call, whole, of_parts[0])
        return of_parts[0] if len(of_parts) == 1 else _joined(of_parts)

    def _half_by_half(
        self, call: PlacedCall, whole: Inputs, halves: Halves
    ) -> tuple[list[Piece], list[torch.Tensor]]:
        """The tensor leaves of the prediction for a batch of two halves, of which the first is left out where
        it can be.

        One stage has no states to keep, so there both are evaluated at once where they are. The half that is
        evaluated at every step is the prompt's in diffusers: with guidance scale g an error of the other then
        counts g - 1 times, else it would count g times.
        """
        step, channel = call.position.step, call.position.channel
        begin = halves.first_step if self.settings.num_stages == 1 else step
        names = [(channel, part) for part in range(2)]
        parts = halves.parts(whole)
        if self.settings.num_stages == 1:
            self._analysis(parts[1])  # a plan is for what is evaluated most
            state = self._channel_state(call, channel, self._analysis(whole), begin=begin, refreshed=True)
            if state.schedule.is_predicted(step):
                pieces = [Piece(0, channel, whole, state)]
                (leaves,) = self._predict(call, whole, pieces)
                of_halves = [leaf.chunk(2) for leaf in leaves]
                halves.observe(step, [last for _, last in of_halves], [first for first, _ in of_halves])
                return pieces, leaves
            wanted = [1]
        else:
            self._channels.pop((call.run, channel), None)
            wanted = [1, 0]
        pieces = [
            Piece(
                0,
                names[part],
                parts[part],
                self._channel_state(
                    call, names[part], self._analysis(parts[part]), begin=begin, refreshed=part == 0
                ),
            )
            for part in wanted
        ]
        evaluated, *others = self._predict(call, whole, pieces)
        for left_out in others:
            halves.observe(step, evaluated, left_out)
        left_out = others[0] if others else halves.left_out(step, evaluated)
        return pieces, _joined([left_out, evaluated])

    def _predict(self, call: PlacedCall, whole: Inputs, pieces: Sequence[Piece]) -> list[list[torch.Tensor]]:
        """Of each piece that is predicted at this step, the tensor leaves."""
        step = call.position.step
        seen_before = self._note_seen(call, pieces)
        self._foretell(call, pieces)
        rounds: dict[int, list[tuple[Piece, Seen | None]]] = {}
        for index, piece in enumerate(pieces):
            piece.state.note_inputs(call, piece.inputs)
            round_ = piece.state.schedule.round_of(step)
            if round_.first_step == step and any(round_.ops):
                before = None if seen_before is None else seen_before[index]
                rounds.setdefault(piece.group, []).append((piece, before))
        if rounds:
            in_turn = {group: self._in_turn(call, whole, own) for group, own in rounds.items()}
            self.groups.run_rounds(call.run, in_turn)
        predicted = [piece for piece in pieces if piece.state.schedule.is_predicted(step)]
        channels = [(piece.group, piece.channel) for piece in predicted]
        of_pieces = self.groups.predictions(call.run, channels, step)
        for leaves, piece in zip(of_pieces, predicted, strict=True):
            if piece.state.settings.tolerance is not None:
                piece.state.note_error(step, leaves.pop().item())
        return of_pieces

    def _in_turn(
        self, call: PlacedCall, whole: Inputs, pieces: Sequence[tuple[Piece, Seen | None]]
    ) -> list[RoundCall]:
        """The rounds of one group in this step, one after the other, each with what comes after it: after the
        last one, the next round of the first piece."""
        rounds = [self._round(call, whole, piece) for piece, _ in pieces]
        first, before = pieces[0]
        following: list[Callable[[], RoundCall | None] | None] = [
            None if seen_before is None else partial(in_advance, round_, piece.inputs, seen_before)
            for round_, (piece, seen_before) in zip(rounds[1:], pieces[1:], strict=True)
        ]
        # With the gate, whether the next one runs in order is not known yet.
        if before is not None and rounds[0].info.gauged is None:
            following.append(
                partial(following_round, call, first.inputs, whole, rounds[0].info, first.state, before)
            )
        else:
            following.append(None)
        return [
            round_ if later is None else replace(round_, following=later)
            for round_, later in zip(rounds, following, strict=True)
        ]

    def _round(self, call: PlacedCall, whole: Inputs, piece: Piece) -> RoundCall:
        inputs, state = piece.inputs, piece.state
        step = call.position.step
        if state.settings.tolerance is not None and not state.error <= state.settings.tolerance:
            state.run_in_order(step)
        if state.schedule.continues_latents and not state.is_sure:
            _foresee(call, whole, inputs, state)
        settings = state.settings
        conditions_of_call = Conditions(settings, call, inputs, whole)
        if call.position.placed:
            conditions_of_call.observe()
        conditions = conditions_of_call.for_round(state.schedule.round_of(step), state.known_arguments)
        if conditions is None:  # the timesteps to come are not known yet: learn from another step in order
            state.run_in_order(step)
            conditions = {}
        info = RoundInfo(
            run=call.run,
            channel=piece.channel,
            key=state.analysis.number,
            first_step=step,
            floats=inputs.floats(),
            history_depth=state.history_depth,
            conditions=dict(conditions),
            timestep_name=timestep_name(inputs.names),
            latents_name=inputs.latents,
            gauged=settings.forecast if settings.tolerance is not None else None,
        )
        round_ = state.schedule.round_of(step)
        continued = {
            ahead: cache(partial(state.course.continued, state.place(ahead))) for ahead in round_.steps_ahead
        }
        return RoundCall(info, round_, inputs.tensors(), continued)

    def _note_seen(self, call: PlacedCall, pieces: Sequence[Piece]) -> list[Seen] | None:
        """What the parts of the channel's call before were given, by which the round after this one is
        foreseen; None where another channel's rounds come in between."""
        channel = call.position.channel
        (last_run, last_channel), self._last_channel = self._last_channel, (call.run, channel)
        if last_run != call.run:
            self._seen = {}
        before = self._seen.get(channel)
        self._seen[channel] = [seen(piece.inputs) for piece in pieces]
        is_next = last_run == call.run and (last_channel == channel or self._is_second_left_out(call))
        if not call.position.placed or not is_next or before is None:
            return None
        return before if len(before) == len(pieces) else None

    def _is_second_left_out(self, call: PlacedCall) -> bool:
        """Whether this is the first of a step's two calls, and no stage does anything for the second one."""
        guided = self._guided.get(call.run)
        second = None if guided is None else guided.second_channel
        state = self._channels.get((call.run, second))
        return state is not None and not any(state.schedule.round_of(call.position.step).ops)

    def _pieces(
        self,
        call: PlacedCall,
        parts: Sequence[Inputs],
        analyses: Sequence[Analysis],
        halves: Halves | None,
    ) -> list[Piece]:
        """What each group has to do. A call that is taken apart in another way than the last one starts
        anew. `halves`: of a second call."""
        channel = call.position.channel
        of_parts = [(channel, part) for part in range(MAX_GROUPS)]
        channels = [channel] if len(analyses) == 1 else of_parts[: len(analyses)]
        for other in (channel, *of_parts):
            if other not in channels:
                self._channels.pop((call.run, other), None)
        groups = range(len(parts)) if len(parts) > 1 else [self._turns.group_of(call, self.settings.groups)]
        return [
            Piece(
                group,
                each,
                part,
                self._channel_state(
                    call,
                    each,
                    analysis,
                    driver_computes=self.groups.driver_computes_in(group),
                    refreshed=halves is not None,
                ),
            )
            for group, each, part, analysis in zip(groups, channels, parts, analyses, strict=True)
        ]

    def _channel_state(
        self,
        call: PlacedCall,
        channel: Any,
        analysis: Analysis,
        *,
        driver_computes: bool = True,
        refreshed: bool = False,
        begin: int | None = None,
    ) -> ChannelState:
        """`refreshed`: only some steps are predicted; `begin`: the first step of its schedule, if it is new;
        None for that of the call."""
        key = (call.run, channel)
        state = self._channels.get(key)
        if state is not None and state.is_refreshed and not refreshed:
            state.predict_all(call.position.step)
        if state is None or not state.follows(call.position, analysis) or state.is_refreshed != refreshed:
            settings = self.settings if refreshed else replace(self.settings, guidance_refresh=1)
            # A gate looks at how well states are forecast, so they are what is.
            if settings.tolerance is not None and settings.forecast == "latents":
                settings = with_line(settings)
            first_step = call.position.step if begin is None else begin
            schedule = self._schedule(
                call.position, first_step, analysis, settings, driver_computes=driver_computes
            )
            state = ChannelState(analysis, settings, schedule, is_refreshed=refreshed)
            self._channels[key] = state
        return state

    def _schedule(
        self,
        position: Position,
        first_step: int,
        analysis: Analysis,
        settings: Settings,
        *,
        driver_computes: bool,
    ) -> Schedule:
        """From this step to the end of the run; a call that cannot be placed is a run of one step."""
        num_steps = position.num_steps if position.placed and position.num_steps else position.step + 1
        return schedule_for(
            analysis.partition.kind,
            analysis.wiring,
            settings,
            first_step,
            num_steps,
            driver_computes=driver_computes,
        )

    # -- guidance's halves -----------------------------------------------------------------------------------

    def _halves(self, call: PlacedCall, inputs: Inputs) -> Halves | None:
        """The halves of guidance that this call is of, if one of them can be left out at times."""
        if self.settings.guidance_refresh == 1:
            return None
        guided = self._guided.setdefault(call.run, GuidedRun())
        position, key = call.position, inputs.key()
        if position.new_step and position.step == 1 and not guided.is_refreshed:
            refresh = f"guidance_refresh={self.settings.guidance_refresh}"
            self._warn("refresh", f"{refresh} changes nothing in this run: {guided.reason}.")
        halves = guided.halves(position.channel)
        first = guided.first_call(call)
        is_new = not guided.knows(position.channel, key)
        if halves is not None:
            is_alone = halves.shared is None and first is None
            is_new = is_new or is_alone or halves.first_step < position.first_step
        if is_new or (halves is not None and halves.is_to_be_checked(position.step)):
            found = self._find_halves(call, inputs, first)
            if is_new or isinstance(found, str):
                guided.settle(position.channel, key, found)
        return guided.halves(position.channel)

    def _find_halves(self, call: PlacedCall, inputs: Inputs, first: FirstCall | None) -> Halves | str:
        """Guidance shows in the latents: both halves have the same. Else why nothing can be left out.

        `first`: the first call of this step, if this is another.
        """
        key, step = inputs.key(), call.position.step
        pipe = calling_pipeline(self.denoiser, self.name) or self.pipe
        if is_guided(pipe) is False:
            return "the pipeline says that guidance is off"
        conditions = Conditions(self.settings, call, inputs, inputs)
        if self.settings.num_stages > 1 and not conditions.can_foresee():
            return "stages have to work ahead for it, but the timesteps to come are not known"
        latents = inputs.tensors()[inputs.latents]
        if first is None:
            # What a pipeline has concatenated to the latents may differ: SVD has no picture in one half.
            scaled = scaled_part(latents, scaled_inputs_of(call.scheduler))
            own = latents if scaled is None else latents.narrow(scaled[0], 0, scaled[1])
            if batch_size(inputs) % 2 == 0 and torch.equal(*own.chunk(2)):
                shared = self.structures.shared_batch(inputs, 2)
                if shared is not None:
                    return Halves(key, step, shared)
            return f"a denoiser call has a batch of {batch_size(inputs)}, which is not guidance's two halves"
        if not self._turns.channels(call.run) <= {first.channel, call.position.channel}:
            self._guided[call.run].end_pairs()
            return "a step has more than two denoiser calls"
        first_latents = first.inputs.tensors()[first.inputs.latents]
        if latents.shape == first_latents.shape and torch.equal(latents, first_latents):
            return Halves(key, step, None)
        return "a step has two denoiser calls with other latents"

    # -- the parts of a batch --------------------------------------------------------------------------------

    def _foretell(self, call: PlacedCall, pieces: Sequence[Piece]) -> None:
        """At a step's first call, what its other calls will be (the other half of guidance). Their groups
        begin with that at once; whether it was right is seen when the call comes."""
        if self.settings.groups == 1 or len(pieces) > 1:
            return
        inputs = pieces[0].inputs
        self._turns.note(call, inputs)
        for guess in self._turns.guesses(call, inputs, self.settings.groups):
            channel, step = guess.call.position.channel, guess.call.position.step
            state = self._channels.get((call.run, channel))
            if state is None or not state.follows(guess.call.position, self._analysis(guess.inputs)):
                continue
            if state.schedule.round_of(step).first_step == step:
                trial = state.copied()
                trial.note_inputs(guess.call, guess.inputs)
                piece = Piece(guess.group, channel, guess.inputs, trial)
                round_ = self._round(guess.call, guess.inputs, piece)
                # One version more is kept than it reads: should the guess be wrong, the round is run again.
                info = replace(round_.info, history_depth=round_.info.history_depth + 1)
                self.groups.foretell(guess.group, replace(round_, info=info))

    def _parts(self, call: PlacedCall, inputs: Inputs) -> tuple[Inputs, ...]:
        """The call itself, or its parts, one for each of the first groups."""
        key = (call.run, call.position.channel)
        shared = self._shared_batch(call, inputs)
        if shared is None:
            self._parts_memory.pop(key, None)
            return (inputs,)
        return self._parts_memory.setdefault(key, PartsMemory()).parts(inputs, shared)

    def _decide_groups(self, inputs: Inputs) -> None:
        """At the first call: two groups if guidance is on, as far as the pipeline says, its batch can be
        shared and the devices can hold as many weights."""
        alternative, self._two_groups = self._two_groups, None
        if alternative is None:
            return
        pipe = calling_pipeline(self.denoiser, self.name) or self.pipe
        if is_guided(pipe) is False or self.structures.shared_batch(inputs, 2) is None:
            return
        if not self.structures.have_room(alternative.num_stages):
            return
        groups = alternative.open()
        self.groups.close()
        self.groups = groups
        self._chose_groups = True
        self.settings = replace(self.settings, num_stages=alternative.num_stages, groups=2)

    def _shared_batch(self, call: PlacedCall, inputs: Inputs) -> SharedBatch | None:
        if self.settings.groups == 1:
            return None
        ways = (
            self.structures.shared_batch(inputs, num_parts)
            for num_parts in range(self.settings.groups, 1, -1)
        )
        shared = next((way for way in ways if way is not None), None)
        is_second_step = call.position.new_step and call.position.step == 1
        if shared is None and is_second_step and self._turns.num_calls(call.run) == 1:
            self._tell_of_unshared(batch_size(inputs))
        return shared

    def _tell_of_unshared(self, batch: int) -> None:
        groups = self.settings.groups
        if batch > 1 and not self._chose_groups:
            three = " Three-way guidance needs three groups." if batch == 3 else ""
            raise ConfigurationError(
                f"The denoiser is called with a batch of {batch}, which cannot be shared between {groups} "
                f'groups of devices.{three} Use guidance="together".'
            )
        self._warn(
            "unshared",
            f"the only denoiser call of a step, with a batch of {batch}, cannot be shared between {groups} "
            'groups of devices: one of them does all of it, and guidance="together" uses them all.',
        )

    # -- where a call stands ---------------------------------------------------------------------------------

    def _place(self, inputs: Inputs) -> PlacedCall:
        pipe = calling_pipeline(self.denoiser, self.name) or self.pipe
        call = self._runs.place(pipe, self._context.current, timestep_argument(inputs))
        if not call.position.placed:
            reason = call.position.reason
            self._warn("unplaced", f"a denoiser call runs in order on the devices, without gain: {reason}.")
        elif call.is_new_run:
            self._check_length(call.position)
        if call.is_new_run or self._is_changed:
            self._is_changed = False
            self.structures.follow_changes()
        return call

    def _check_length(self, position: Position) -> None:
        settings = self.settings
        assert position.num_steps is not None
        if settings.stride > position.num_steps:
            raise ConfigurationError(
                f"stride={settings.stride} is longer than the run of {position.num_steps} steps. Use "
                f"stride={position.num_steps} or less, or more steps."
            )
        if settings.group_size > 1 and position.num_steps <= settings.warmup_steps + _SHORT_RUN_MARGIN:
            self._warn(
                "short",
                f"a run of {position.num_steps} steps with warmup_steps={settings.warmup_steps} is too short "
                "to gain from asynchronous denoising.",
            )
        refreshes = (position.num_steps - settings.warmup_steps) // settings.guidance_refresh
        is_ever_left_out = settings.guidance_refresh > 1 and position.num_steps > settings.warmup_steps
        if is_ever_left_out and refreshes < _FEW_REFRESHES:
            self._warn(
                "few refreshes",
                f"a run of {position.num_steps} steps is too short for guidance_refresh="
                f"{settings.guidance_refresh}: what is left out of guidance changes too much from one "
                "refresh to the next, above all with a high guidance scale. Use a smaller number, or more "
                "steps.",
            )

    def _end_runs(self, ended: tuple[int, ...]) -> None:
        self._channels = {key: state for key, state in self._channels.items() if key[0] not in ended}
        self._turns.forget(ended)
        self._guided = {run: guided for run, guided in self._guided.items() if run not in ended}
        self._parts_memory = {
            key: memory for key, memory in self._parts_memory.items() if key[0] not in ended
        }
        self._calls = {run: calls for run, calls in self._calls.items() if run not in ended}
        self.groups.end_runs(ended)

    # -- the rest --------------------------------------------------------------------------------------------

    def set(self, warmup_steps: int, tolerance: float | None) -> None:
        """Change how many steps run in order, from the next run on."""
        with self._lock:
            self.settings = replace(self.settings, warmup_steps=warmup_steps, tolerance=tolerance)
            if self.plan is not None:
                self.structures.plan = replace(self.plan, warmup_steps=warmup_steps, tolerance=tolerance)

    def recorded(self, run: int) -> RunRecord:
        """What was noted of a run, with what the workers hold now. Not before the first call."""
        return RunRecord(self._calls.get(run, []), self.groups.reports(run))

    def _note_call(self, call: PlacedCall, pieces: Sequence[Piece], start_s: float) -> None:
        position = call.position
        in_order = any(piece.state.schedule.round_of(position.step).in_order for piece in pieces)
        record = CallRecord(position.step, position.channel, start_s, time.perf_counter(), in_order)
        self.last_call = (record.end_s, call.run)
        self._calls.setdefault(call.run, []).append(record)

    def _refuse_gradients(self, inputs: Inputs) -> None:
        if any(tensor.requires_grad for tensor in inputs.tensors().values()):
            raise ParallelizedError(
                "Gradients through the denoiser are not possible while it is divided over devices. Call "
                "handle.remove() first."
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warn_user(message)


def _foresee(call: PlacedCall, whole: Inputs, inputs: Inputs, state: ChannelState) -> None:
    """Find out what the timesteps to come will be; where they follow no known rule, no stage works ahead.

    What is not sure yet is looked at again in the next round: it may have been rounded in another way.
    """
    conditions = Conditions(state.settings, call, inputs, whole)
    if conditions.can_foresee():
        state.foreseen, state.is_sure = conditions.foreseen(state.schedule.num_steps)
    else:
        state.forecast_states(call.position.step)


def _joined(of_parts: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """The tensor leaves of a prediction, of all parts of the batch one after the other."""
    return [torch.cat(leaves) for leaves in zip(*of_parts, strict=True)]


class _IntraOpThreads:
    """The plan's number of threads while the denoiser runs; text encoders and VAE keep theirs."""

    def __init__(self, count: int | None) -> None:
        self._count = count

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        if self._count is not None and self._count != self._before:
            torch.set_num_threads(self._count)

    def __exit__(self, *exc: object) -> None:
        if self._count is not None and self._count != self._before:
            torch.set_num_threads(self._before)

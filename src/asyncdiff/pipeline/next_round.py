"""What the round after this one will be, as far as it can be told before its call.

For executors that let a worker go ahead (`asyncdiff.runtime.lookahead`). They compare the guess with the call
when it comes, so nothing depends on it being right but time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from asyncdiff.errors import ConfigurationError
from asyncdiff.pipeline.noise_scheduler import timesteps_of
from asyncdiff.pipeline.run_state import ChannelState, Conditions, timestep_argument
from asyncdiff.pipeline.runs import PlacedCall
from asyncdiff.pipeline.timesteps import other_step_names
from asyncdiff.protocol.messages import RoundInfo
from asyncdiff.runtime.executor import RoundCall
from asyncdiff.runtime.lookahead import version_of
from asyncdiff.trace import Inputs

Seen = Mapping[str, tuple[torch.Tensor, int]]
"""The tensor inputs of a call, with their versions."""


def seen(inputs: Inputs) -> Seen:
    """What is remembered of a call's inputs until the next one."""
    return {name: (tensor, version_of(tensor)) for name, tensor in inputs.tensors().items()}


def following_round(
    call: PlacedCall, inputs: Inputs, whole: Inputs, info: RoundInfo, state: ChannelState, before: Seen
) -> RoundCall | None:
    """The next round of this call's channel, with the inputs that did not change since the call `before` and
    the next timestep; None where there is none or its timestep is not known. `whole` as in `Conditions`.

    Not for a timestep on a GPU: to look at it would mean to wait for the GPU.
    """
    round_ = state.schedule.round_of(call.position.step)
    step = round_.steps[-1] + 1
    argument = timestep_argument(inputs)
    is_on_gpu = isinstance(argument, torch.Tensor) and argument.device.type != "cpu"
    if step >= state.schedule.num_steps or argument is None or is_on_gpu or other_step_names(inputs.names):
        return None
    later = at_step(call, step)
    timestep = state.foreseen[step] if state.is_sure else _timestep(call, later, argument)
    if timestep is None:
        return None
    following = state.schedule.round_of(step)
    conditions = Conditions(state.settings, later, inputs, whole).for_round(following, state.known_arguments)
    if conditions is None:
        return None
    tensors = _unchanged(inputs, before)
    floats = dict(info.floats)
    name = str(info.timestep_name)
    if isinstance(timestep, torch.Tensor):
        tensors[name] = timestep
    else:
        floats[name] = timestep
    # One version more is kept than it reads: should the guess be wrong, the round is run again.
    ahead = replace(
        info, first_step=step, floats=floats, conditions=conditions, history_depth=info.history_depth + 1
    )
    return RoundCall(ahead, following, tensors)


def in_advance(round_: RoundCall, inputs: Inputs, before: Seen) -> RoundCall:
    """A round of this very step, but later in it, with the inputs that need not be transferred: those that
    did not change since the step `before`, and the timestep unless it is on a GPU."""
    tensors, name = _unchanged(inputs, before), round_.info.timestep_name
    given = inputs.tensors()
    if name is not None and name in given and given[name].device.type == "cpu":
        tensors[name] = given[name]
    return replace(round_, tensors=tensors, continued={})


def _unchanged(inputs: Inputs, before: Seen) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in inputs.tensors().items()
        if name in before and before[name][0] is tensor and before[name][1] == version_of(tensor) >= 0
    }


def at_step(call: PlacedCall, step: int) -> PlacedCall:
    """The call of the same channel at another step."""
    position = call.position
    index = position.timestep_index + step - position.step
    return replace(call, position=replace(position, step=step, timestep_index=index))


def _timestep(call: PlacedCall, later: PlacedCall, argument: Any) -> Any:
    """The denoiser's timestep at the later call; None where it is not known."""
    timesteps, index = timesteps_of(call.scheduler), later.position.timestep_index
    if timesteps is None or index >= len(timesteps):
        return None
    try:
        call.timesteps.observe(timesteps[call.position.timestep_index], argument)
        return call.timesteps.map.argument_for(timesteps[index], like=argument)
    except ConfigurationError:
        return None

"""The calls of a step that are not taken apart: they take turns with the groups of devices.

Guidance as two calls: the second has a group of its own, which would wait for the first to return. What it
will be given is known before: what it was given at the last step, with the latents and timestep of the first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from asyncdiff.pipeline.next_round import at_step
from asyncdiff.pipeline.runs import PlacedCall
from asyncdiff.pipeline.timesteps import timestep_name
from asyncdiff.runtime.lookahead import version_of
from asyncdiff.trace import Inputs
from asyncdiff.tracking import Channel


@dataclass(frozen=True)
class Guess:
    """A call that will probably be made in this step, by another group than those that are at work."""

    group: int
    call: PlacedCall
    inputs: Inputs


@dataclass
class Turns:
    """By run, in which order the channels of a step are called, and the last call of each."""

    _order: dict[int, list[Channel]] = field(default_factory=dict)
    _last: dict[tuple[int, Channel], tuple[PlacedCall, Inputs]] = field(default_factory=dict)

    def group_of(self, call: PlacedCall, groups: int) -> int:
        """The group that makes a call."""
        order = self._order.setdefault(call.run, [])
        if call.position.channel not in order:
            order.append(call.position.channel)
        return order.index(call.position.channel) % groups

    def note(self, call: PlacedCall, inputs: Inputs) -> None:
        self._last[call.run, call.position.channel] = (call, inputs)

    def channels(self, run: int) -> Set[Channel]:
        """Of the calls that the steps of this run have had."""
        return set(self._order.get(run, ()))

    def num_calls(self, run: int) -> int:
        """How many calls a step of this run has had at most."""
        return len(self.channels(run))

    def guesses(self, call: PlacedCall, inputs: Inputs, groups: int) -> Iterator[Guess]:
        """At the first call of a step, the others that were made at the last step too."""
        order, step = self._order[call.run], call.position.step
        if not call.position.placed or call.position.channel != order[0]:
            return
        for group, channel in enumerate(order[1:groups], start=1):
            last_call, last_inputs = self._last.get((call.run, channel), (None, inputs))
            expected = _with_step_of(last_inputs, inputs)
            if last_call is not None and last_call.position.step == step - 1 and expected is not None:
                yield Guess(group, at_step(last_call, step), expected)

    def forget(self, runs: Collection[int]) -> None:
        """These runs are over."""
        self._order = {run: order for run, order in self._order.items() if run not in runs}
        self._last = {key: last for key, last in self._last.items() if key[0] not in runs}


def _with_step_of(inputs: Inputs, newer: Inputs) -> Inputs | None:
    """The inputs with the latents and the timestep of another call; None where those do not take their
    place."""
    replaced: dict[str, Any] = {}
    for name in (inputs.latents, timestep_name(inputs.names)):
        if name is None or name not in newer.names:
            return None
        replaced[name] = newer.leaves[newer.names.index(name)]
        if isinstance(replaced[name], torch.Tensor) and version_of(replaced[name]) < 0:
            return None  # nobody could tell whether it has been written to since
    leaves = [replaced.get(name, leaf) for name, leaf in zip(inputs.names, inputs.leaves, strict=True)]
    expected = replace(inputs, leaves=tuple(leaves))
    return expected if expected.key() == inputs.key() else None

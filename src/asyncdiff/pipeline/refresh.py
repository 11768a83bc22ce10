"""Guidance's halves in steps that evaluate only one of them (docs/method.md, section 7).

The difference between the halves changes slowly. Where both are evaluated it is noted; where one is left out,
it is the other and the difference continued.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from asyncdiff.guidance import PartsMemory, SharedBatch
from asyncdiff.pipeline.course import Curve
from asyncdiff.pipeline.runs import PlacedCall
from asyncdiff.trace import Inputs
from asyncdiff.tracking import Channel

_CHECKED_STEPS = 2
"""Two pictures may begin with the same noise and yet have other prompts: their latents differ one step later.
"""


@dataclass
class Halves:
    """The halves of a call of a run that is made at every step since `first_step`, and what their difference
    has been.

    `key`: the structure of the call. `shared`: how its batch is the two halves; None where the second one is
    the step's second call.
    """

    key: Hashable
    first_step: int
    shared: SharedBatch | None
    _memory: PartsMemory = field(default_factory=PartsMemory)
    _differences: list[Curve] = field(default_factory=list)

    def parts(self, inputs: Inputs) -> tuple[Inputs, ...]:
        """The halves of a batch."""
        assert self.shared is not None
        return self._memory.parts(inputs, self.shared)

    def is_to_be_checked(self, step: int) -> bool:
        """Whether it is not certain yet that these are halves of one prediction."""
        return step < self.first_step + _CHECKED_STEPS

    def observe(self, step: int, evaluated: Sequence[torch.Tensor], left_out: Sequence[torch.Tensor]) -> None:
        """Note both halves of a prediction, each by its tensor leaves: the one that every step evaluates, and
        the one that others leave out."""
        pairs = zip(left_out, evaluated, strict=True)
        differences = [_wide(one) - _wide(other) for one, other in pairs]
        if not self._differences:
            # The first line is longest, and leads from a step of pure noise: at 20 steps and guidance 7.5 the
            # bundled U-Net's pictures are 4 dB nearer without it (k = 4).
            self._differences = [Curve(step, each, trusts_first_line=False) for each in differences]
            return
        for curve, difference in zip(self._differences, differences, strict=True):
            curve.observe(step, difference)

    def left_out(self, step: int, evaluated: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What stands for the half that this step leaves out, in the other's dtypes."""
        return [
            (_wide(leaf) + curve.continued(step)).to(leaf.dtype)
            for leaf, curve in zip(evaluated, self._differences, strict=True)
        ]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class FirstCall:
    """The first call of a step and what it predicted, until the second one comes."""

    step: int
    channel: Channel
    inputs: Inputs
    leaves: list[torch.Tensor]


@dataclass
class GuidedRun:
    """Which calls of a run are guidance's halves. `reason`: why none is, as far as is known."""

    reason: str = ""
    _found: dict[Channel, tuple[Hashable, Halves | None]] = field(default_factory=dict)
    _first_call: FirstCall | None = None

    def knows(self, channel: Channel, key: Hashable) -> bool:
        """Whether the channel's call, with inputs of this structure, has been looked at."""
        return channel in self._found and self._found[channel][0] == key

    def halves(self, channel: Channel) -> Halves | None:
        """What the channel's call was found to be; None if nothing that could be refreshed."""
        return self._found[channel][1] if channel in self._found else None

    @property
    def is_refreshed(self) -> bool:
        return any(halves is not None for _, halves in self._found.values())

    @property
    def second_channel(self) -> Channel | None:
        """That of the call that is left out at times."""
        found = (channel for channel, (_, halves) in self._found.items() if halves and halves.shared is None)
        return next(found, None)

    def settle(self, channel: Channel, key: Hashable, found: Halves | str) -> None:
        """Note halves, or why the call is none."""
        if isinstance(found, str):
            self.reason = found
            self._found[channel] = (key, None)
        else:
            self._found[channel] = (key, found)

    def end_pairs(self) -> None:
        """No second call is a half from now on: there is a third."""
        for channel, (key, halves) in self._found.items():
            if halves is not None and halves.shared is None:
                self._found[channel] = (key, None)

    def note_first_call(self, call: PlacedCall, inputs: Inputs, leaves: Sequence[torch.Tensor]) -> None:
        """The leaves are copied: a pipeline may write into what it was given."""
        copies = [leaf.clone() for leaf in leaves]
        self._first_call = FirstCall(call.position.step, call.position.channel, inputs, copies)

    def first_call(self, call: PlacedCall) -> FirstCall | None:
        """The first call of the same step, where this one is another."""
        first = self._first_call
        if first is None or first.step != call.position.step or first.channel == call.position.channel:
            return None
        return first

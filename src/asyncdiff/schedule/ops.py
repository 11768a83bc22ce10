"""The vocabulary of a schedule: values, reads and the operations of one worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias


class Value(NamedTuple):
    """What one segment produced when it ran for `step`; assigned once.

    In a round of stride S the states of the segments that run once are labelled with the round's first step
    b, and so are those of the outer segments of a nested split that the inner stages read. The channel
    (which of several denoiser calls of a step) is not part of it: every channel has its own values.
    """

    segment: int
    step: int

    def __str__(self) -> str:
        return f"H{self.segment}({self.step})"


class Term(NamedTuple):
    """One version and its weight in a read."""

    value: Value
    weight: float


@dataclass(frozen=True)
class Read:
    """How a segment reads what segment `segment` produced: a weighted sum of versions.

    `((Value(k, s), 1.0),)` reads one version as it is; `((a, 1 + r), (b, -r))` is the line through two of
    docs/method.md section 5, newest first. Only floating-point leaves are forecast; others take the newer
    version. `fresh`: holds for those leaves of the segment that arrive in time to be read in the round that
    produces them (section 6); another read holds for the others. `damped`: the line's slope is multiplied by
    how well the last changes of each leaf have followed those before.
    """

    segment: int
    terms: tuple[Term, ...]
    fresh: bool = False
    damped: bool = False

    @property
    def newest(self) -> Value:
        return self.terms[0].value


@dataclass(frozen=True)
class Compute:
    """Run a segment.

    `step`: the step it runs for (a copy of the replicated stage: the step it predicts). `value`: what it
    produces. `input_step`: the step whose denoiser inputs (latents, conditions) it reads. `latents_step`: the
    step to which those of them that change are continued; `input_step` where they are read as they are.
    `condition_step`: the step whose timestep conditions it (time shift included). `reads`: of each foreign
    segment it reads from one, or two where some leaves are read fresh. Computes of one worker with the same
    `step` are one forward of its stage.
    """

    segment: int
    step: int
    value: Value
    input_step: int
    latents_step: int
    condition_step: int
    reads: tuple[Read, ...] = ()


@dataclass(frozen=True)
class Send:
    """Send a value's crossing leaves to another worker, as soon as each exists."""

    value: Value
    to_rank: int


@dataclass(frozen=True)
class Recv:
    """Receive a value's crossing leaves from another worker, before the first read of it."""

    value: Value
    from_rank: int


@dataclass(frozen=True)
class SendPrediction:
    """Send the prediction for `step` to the driver (rank 0)."""

    step: int


@dataclass(frozen=True)
class Predict:
    """The driver hands the prediction for `step` to the pipeline; `from_rank` computed it (0: itself)."""

    step: int
    from_rank: int


Op: TypeAlias = Compute | Send | Recv | SendPrediction | Predict

"""The denoiser's inputs at steps to come, for stages that work ahead (docs/method.md, section 5)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from asyncdiff.runtime.lookahead import version_of
from asyncdiff.runtime.trend import sampled

_POINTS = 3
_MEMORY = 0.5
_TINY = torch.finfo(torch.float32).tiny

Number = Any
"""A float, or a tensor with one element, which nobody waits for."""


class Course:
    """What the inputs of one channel of a run have been at its last steps.

    A place is where a step lies on the course: any number that grows with the steps. Which inputs change is
    settled by the first two steps: those floating-point tensors that are not the same, bit for bit. A mask
    that a pipeline makes anew at every step is none of them.
    """

    def __init__(self) -> None:
        self._first: dict[str, _First] | None = None
        self._curves: dict[str, Curve] | None = None

    def observe(
        self, place: float, tensors: Mapping[str, torch.Tensor], *, latents: str, without: str | None
    ) -> None:
        """Note the inputs of a step but the one called `without` (the timestep). The one called `latents`
        changes even if it has not yet."""
        if self._curves is None:
            inputs = {name: each for name, each in tensors.items() if name != without}
            if self._first is None:
                self._first = {
                    name: _First(place, each, version_of(each), each.clone())
                    for name, each in inputs.items()
                    if each.is_floating_point()
                }
                return
            self._curves = {
                name: Curve(first.place, first.copy)
                for name, first in self._first.items()
                if name == latents or first.differs_from(inputs[name])
            }
            self._first = None
        for name, curve in self._curves.items():
            curve.observe(place, tensors[name].clone())

    def copied(self) -> Course:
        """A copy that goes on by itself. The points are shared: nobody writes into them."""
        other = Course()
        other._first = self._first
        other._curves = self._curves and {name: copy.copy(curve) for name, curve in self._curves.items()}
        return other

    def continued(self, place: float) -> dict[str, torch.Tensor]:
        """The inputs that change as they will be at `place`, in their own dtypes."""
        return {name: curve.continued(place) for name, curve in (self._curves or {}).items()}


@dataclass(frozen=True)
class _First:
    """An input of the first step: the tensor itself and its version then, and a copy."""

    place: float
    tensor: torch.Tensor
    version: int
    copy: torch.Tensor

    def differs_from(self, later: torch.Tensor) -> bool:
        if later is self.tensor and version_of(later) == self.version >= 0:
            return False
        return not torch.equal(later, self.copy)


class Curve:
    """The last points of one input, and what is made of them: the newest, and from there as far along the
    line through the last two, with as much of the parabola's bend, as such ways have held.

    How far they have held is told by the newest point when it comes, by least squares over all points, older
    ones counting less: latents to which a noise scheduler adds noise follow no line, those of a solver of
    higher order no parabola. A few thousand elements tell it well enough. It is looked at when something is
    to be continued, not in the way of a step that others wait for.
    """

    def __init__(self, place: float, tensor: torch.Tensor, *, trusts_first_line: bool = True) -> None:
        self._points = [_Point(place, tensor)]
        self._unlearned: tuple[Sequence[_Point], _Point] | None = None
        self._sums: torch.Tensor | None = None
        self._trust = float(trusts_first_line)

    def observe(self, place: float, tensor: torch.Tensor) -> None:
        """Note a point. At a place that was noted before (a second evaluation of one step) it takes the
        other's place, and tells nothing about the others."""
        self._learn()
        newest = _Point(place, tensor)
        others = [point for point in self._points if point.place != place]
        if len(others) == len(self._points) > 1:
            self._unlearned = others, newest
        self._points = [*others, newest][-_POINTS:]

    def _learn(self) -> None:
        if self._unlearned is None:
            return
        (points, newest), self._unlearned = self._unlearned, None
        along_line, along_bend = _ways(points, newest.place)
        *before, last = [after.step_from(before) for before, after in itertools.pairwise(points)]
        change = newest.step_from(points[-1])
        line = last * along_line[-1]
        if before:
            bend = torch.add(last * along_bend[-1], before[-1], alpha=along_bend[-2])
        else:
            bend = torch.zeros_like(change)
        of_all = torch.stack([line, bend, change])
        if self._sums is None:
            self._sums = of_all @ of_all.T
        else:
            self._sums = torch.addmm(self._sums, of_all, of_all.T, beta=_MEMORY)

    def continued(self, place: float) -> torch.Tensor:
        """The input at a place, summed in float32 at least. On a GPU nobody waits for how it is made up."""
        both, bend = self._held()
        # From weights of the steps between the points to those of the points.
        ways = zip(*_ways(self._points, place), strict=True)
        of_steps = [0.0, *(both * (line + bend * beyond) for line, beyond in ways), -1.0]
        weights = [before - after for before, after in itertools.pairwise(of_steps)]
        dtype = self._points[-1].tensor.dtype
        if dtype.itemsize >= torch.float32.itemsize:
            return _weighted(weights, [point.tensor for point in self._points])
        return _weighted(weights, [point.tensor.float() for point in self._points]).to(dtype)

    def _held(self) -> tuple[Number, Number]:
        """What the way along line and bend is multiplied by, and in it the bend, both between 0 and 1."""
        self._learn()
        if self._sums is None:  # nobody has seen what becomes of a line
            return self._trust, 0.0
        # Operations on single numbers cost more than those on the points, where nobody has to wait for them.
        sums = self._sums.tolist() if self._sums.device.type == "cpu" else self._sums
        (line_line, line_bend, along_line), (_, bend_bend, along_bend), _ = sums
        bend = _share(along_bend - line_bend, bend_bend)
        along = along_line + bend * along_bend
        whole = line_line + bend * (2 * line_bend + bend * bend_bend)
        return _share(along, whole), bend


class _Point:
    """Of an input. `tensor` is nobody else's."""

    def __init__(self, place: float, tensor: torch.Tensor) -> None:
        self.place = place
        self.tensor = tensor
        self._sample = sampled(tensor).float()
        self._step: tuple[torch.Tensor, torch.Tensor] | None = None

    def step_from(self, before: _Point) -> torch.Tensor:
        """From some of the elements of the point before to those of this one, in float32. Kept with those,
        not with the point, which would keep the one before."""
        if self._step is None or self._step[0] is not before._sample:
            self._step = before._sample, self._sample - before._sample
        return self._step[1]


def _share(part: Number, whole: Number) -> Number:
    """The quotient, between 0 and 1."""
    if isinstance(whole, torch.Tensor):
        return (part / whole.clamp_min(_TINY)).clamp(0.0, 1.0)
    return min(max(part / max(whole, _TINY), 0.0), 1.0)


def _weighted(weights: Sequence[Number], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum. Each product is rounded: nothing depends on which elements are computed together."""
    pairs = zip(weights, tensors, strict=True)
    first, *others = (
        tensor * weight for weight, tensor in pairs if isinstance(weight, torch.Tensor) or weight != 0.0
    )
    for each in others:
        first += each
    return first


def _ways(points: Sequence[_Point], place: float) -> tuple[list[float], list[float]]:
    """From the newest point to `place` along the line through the last two, and what the parabola through the
    last three adds to that: the factors of the steps between the points (Newton's form)."""
    gaps = [after.place - before.place for before, after in itertools.pairwise(points)]
    line, bend = [0.0] * len(gaps), [0.0] * len(gaps)
    if gaps:
        line[-1] = (place - points[-1].place) / gaps[-1]
    if len(gaps) > 1:
        beyond = (place - points[-1].place) * (place - points[-2].place) / (gaps[-1] + gaps[-2])
        bend[-2:] = -beyond / gaps[-2], beyond / gaps[-1]
    return line, bend

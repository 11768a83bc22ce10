"""How far the line through the last two versions of a tensor can be trusted (docs/method.md, section 5).

When a version arrives, the change that led to it can be compared with the change before: that is what the
line had promised. A few thousand elements tell it well enough, so that it costs no pass over the whole.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from functools import lru_cache

import torch

from asyncdiff.config import STATE_FORECASTS

_TINY = torch.finfo(torch.float32).tiny
_SAMPLE = 8192
_MEMORY = 0.5
_KEPT = 3  # a round that was announced and came otherwise, the one it stood for, and the one before


@dataclass(frozen=True)
class _Change:
    """From the version labelled `older` to that labelled `newest`, of the sampled elements, in float32."""

    newest: int
    older: int
    sample: torch.Tensor


@dataclass(frozen=True)
class _Known:
    """After some change. `products`: sums of <change, promised> and of <promised, promised> so far.
    `errors`: by how much the newest version was missed, relative to it, by each kind of forecast."""

    last: _Change
    products: torch.Tensor | None
    damping: float | torch.Tensor
    errors: dict[str, torch.Tensor]


class Trend:
    """What is remembered of one tensor of a run and channel: its last change, and how the changes before
    have followed from those before them."""

    def __init__(self) -> None:
        self._known: deque[_Known] = deque(maxlen=_KEPT)

    def observe(self, newest: torch.Tensor, older: torch.Tensor, labels: tuple[int, int]) -> None:
        """Take note of the two newest versions. `labels`: their steps. What was noted of the newer one's step
        and later ones is forgotten: a round is run again, perhaps with other versions."""
        while self._known and self._known[-1].last.newest >= labels[0]:
            self._known.pop()
        arrived = sampled(newest).float()
        change = _Change(*labels, arrived - sampled(older).float())
        self._known.append(_follow(self._known[-1] if self._known else None, change, arrived))

    @property
    def damping(self) -> float | torch.Tensor:
        """What the slope of the line through the two newest versions is multiplied by: between 0, where the
        last changes had nothing to do with those before, and 1; 1 before any is known. A number on a CPU, a
        tensor elsewhere, which nobody waits for.

        Least squares over the last changes, older ones counting half each: alpha = <c, p> / <p, p> for the
        change c and what the line had promised, p.
        """
        return self._known[-1].damping if self._known else 1.0

    def error(self, forecast: str) -> torch.Tensor:
        """How far the newest version is from what was forecast of it, relative to its size: a scalar. What is
        forecast of the second version is the first."""
        return self._known[-1].errors[forecast]


def _follow(known: _Known | None, change: _Change, arrived: torch.Tensor) -> _Known:
    missed = _relative(change.sample, arrived)
    if known is None or known.last.newest != change.older:
        return _Known(change, None, 1.0, dict.fromkeys(STATE_FORECASTS, missed))
    last = known.last
    promised = last.sample * ((change.newest - change.older) / (last.newest - last.older))
    products = torch.stack([(change.sample * promised).sum(), (promised * promised).sum()])
    if known.products is not None:
        products += _MEMORY * known.products
    along, whole = products
    alpha = (along / whole.clamp_min(_TINY)).clamp(0.0, 1.0)
    errors = {
        "none": missed,
        "linear": _relative(change.sample - promised, arrived),
        "damped": _relative(change.sample - known.damping * promised, arrived),
    }
    return _Known(change, products, alpha.item() if alpha.device.type == "cpu" else alpha, errors)


def _relative(missed: torch.Tensor, arrived: torch.Tensor) -> torch.Tensor:
    """The norm of the one over that of the other; 0 for nothing missed of nothing."""
    return torch.linalg.vector_norm(missed) / torch.linalg.vector_norm(arrived).clamp_min(_TINY)


def sampled(tensor: torch.Tensor) -> torch.Tensor:
    """At most a few thousand elements, in row-major order, the same whatever the tensor's strides."""
    slices = _slices(tuple(tensor.shape))
    return tensor.flatten() if slices is None else tensor[slices].flatten()


@lru_cache(maxsize=256)
def _slices(shape: tuple[int, ...]) -> tuple[slice, ...] | None:
    """Which elements of a tensor; None for all."""
    steps, sizes = [1] * len(shape), list(shape)
    while math.prod(sizes) > _SAMPLE:
        longest = max(range(len(shape)), key=sizes.__getitem__)
        steps[longest] *= 2
        sizes[longest] = -(-shape[longest] // steps[longest])
    return tuple(slice(None, None, step) for step in steps) if max(steps, default=1) > 1 else None

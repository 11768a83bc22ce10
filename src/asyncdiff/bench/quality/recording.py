"""What a run gives its noise scheduler at every step, and the latents it ends with."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StepRecording:
    """`predictions`: per step what `scheduler.step` was given (guidance applied), `latents`: what it returned
    last; copies on the CPU. None and nothing for a pipeline that steps no noise scheduler."""

    def __init__(self) -> None:
        self.predictions: list[torch.Tensor] = []
        self.latents: torch.Tensor | None = None

    def note(self, prediction: torch.Tensor, latents: torch.Tensor) -> None:
        self.predictions.append(_copy(prediction))
        self.latents = latents

    def finish(self) -> None:
        if self.latents is not None:
            self.latents = _copy(self.latents)


@contextmanager
def recorded_steps(scheduler: Any) -> Iterator[StepRecording]:
    """Note the steps of a noise scheduler for a while; whoever else listens to it goes on listening."""
    recording = StepRecording()
    attributes = vars(scheduler)
    before = attributes.get("step")
    original = scheduler.step

    @functools.wraps(original, updated=())  # pipelines look at the signature
    def step(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        prediction = args[0] if args else kwargs["model_output"]
        recording.note(prediction, result[0])
        return result

    attributes["step"] = step
    try:
        yield recording
    finally:
        if before is None:
            del attributes["step"]
        else:
            attributes["step"] = before
        recording.finish()


def relative_errors(found: torch.Tensor, expected: torch.Tensor) -> list[float]:
    """L2 of the difference over L2 of what was expected, for each of the first dimension; in float64."""
    reference = expected.double().flatten(1)
    difference = (found.double().flatten(1) - reference).norm(dim=1)
    # Equal zeros are no error.
    smallest = torch.finfo(torch.float64).tiny
    values: list[float] = (difference / reference.norm(dim=1).clamp_min(smallest)).tolist()
    return values


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)

"""Which noise scheduler drives a denoiser call: that of the calling pipeline, looked up at every call."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from asyncdiff.pipeline.noise_scheduler import timesteps_of

_MAX_FRAMES = 40


def calling_pipeline(denoiser: nn.Module) -> Any | None:
    """The nearest caller up the stack that is an object with this denoiser and a noise scheduler.

    Several pipelines may share one denoiser (`from_pipe`, `**pipe.components`), each with a noise scheduler
    of its own, and users replace `pipe.scheduler`: the calling frame is where the truth is.
    """
    frame = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        if frame.f_back is None:
            return None
        frame = frame.f_back
        candidate = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames[:1] else None
        if candidate is not None and _drives(candidate, denoiser):
            return candidate
    return None


def _drives(candidate: Any, denoiser: nn.Module) -> bool:
    if isinstance(candidate, nn.Module):
        return False
    attributes = getattr(candidate, "__dict__", {})
    return any(value is denoiser for value in attributes.values()) and _has_noise_scheduler(candidate)


def _has_noise_scheduler(candidate: Any) -> bool:
    scheduler = getattr(candidate, "scheduler", None)
    return scheduler is not None and timesteps_of(scheduler) is not None

"""Which noise scheduler drives a denoiser call: that of the calling pipeline, looked up at every call."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from asyncdiff.pipeline.noise_scheduler import timesteps_of

_MAX_FRAMES = 40
# Of modules, which are no pipelines: to look at a frame's variables takes microseconds.
_MODULE_CALL = nn.Module._wrapped_call_impl.__code__
_MODULE_CALL_INSIDE = nn.Module._call_impl.__code__


def noise_scheduler_of(pipe: Any, denoiser_name: str) -> Any | None:
    """The one that drives a denoiser of this pipeline: `prior_scheduler` for the prior where there is one
    (unCLIP), else `scheduler`; None where there is none."""
    own = getattr(pipe, f"{denoiser_name}_scheduler", None)
    return own if own is not None else getattr(pipe, "scheduler", None)


def is_guided(pipe: Any) -> bool | None:
    """Whether classifier-free guidance is on in the call that this pipeline is making; None where it does not
    say."""
    is_on = getattr(pipe, "do_classifier_free_guidance", None)
    return None if is_on is None else bool(is_on)


def calling_pipeline(denoiser: nn.Module, name: str) -> Any | None:
    """The nearest caller up the stack that is an object with this denoiser and a noise scheduler.

    Several pipelines may share one denoiser (`from_pipe`, `**pipe.components`), each with a noise scheduler
    of its own, and users replace `pipe.scheduler`: the calling frame is where the truth is.
    """
    frame = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        if frame.f_back is None:
            return None
        frame = frame.f_back
        code = frame.f_code
        if code is _MODULE_CALL or code is _MODULE_CALL_INSIDE:
            continue
        candidate = frame.f_locals.get("self") if "self" in code.co_varnames[:1] else None
        if candidate is not None and _drives(candidate, denoiser, name):
            return candidate
    return None


def _drives(candidate: Any, denoiser: nn.Module, name: str) -> bool:
    if isinstance(candidate, nn.Module):
        return False
    attributes = getattr(candidate, "__dict__", {})
    return any(value is denoiser for value in attributes.values()) and _has_noise_scheduler(candidate, name)


def _has_noise_scheduler(candidate: Any, denoiser_name: str) -> bool:
    scheduler = noise_scheduler_of(candidate, denoiser_name)
    return scheduler is not None and timesteps_of(scheduler) is not None

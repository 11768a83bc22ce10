"""Finding a pipeline's denoiser, and calling it as it was before anything was installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from asyncdiff.errors import ConfigurationError

_NAMES = ("transformer", "unet", "prior", "decoder")


def denoiser_of(pipe: Any) -> nn.Module:
    """`pipe.transformer` or `pipe.unet`; `ConfigurationError` for what has neither or is not a pipeline."""
    for name in _NAMES[:2]:
        denoiser = getattr(pipe, name, None)
        if isinstance(denoiser, nn.Module):
            return denoiser
    raise ConfigurationError(
        f"{type(pipe).__name__} has no denoiser: a diffusers pipeline with a `unet` or a `transformer` is "
        "needed."
    )


def device_of(denoiser: nn.Module) -> torch.device:
    """Where the denoiser's parameters are; `ConfigurationError` unless they are on one device."""
    devices = {parameter.device for parameter in denoiser.parameters()}
    if not devices:
        raise ConfigurationError(f"{type(denoiser).__name__} has no parameters.")
    if len(devices) > 1 or next(iter(devices)).type == "meta":
        raise ConfigurationError(
            f"The denoiser's weights are on {', '.join(sorted(map(str, devices)))}, but they must be on one "
            f"device: load the pipeline without device_map and without offloading, and call pipe.to(device)."
        )
    return next(iter(devices))


def refuse_compiled(denoiser: nn.Module) -> None:
    """`ConfigurationError` for a denoiser compiled as a whole: it would run past a forward in its place."""
    if isinstance(denoiser, torch._dynamo.OptimizedModule) or denoiser._compiled_call_impl is not None:
        raise ConfigurationError(
            "The denoiser is compiled as a whole by torch.compile, which cannot be divided over devices. "
            "Compile its blocks instead (denoiser.compile_repeated_blocks()), or leave it uncompiled."
        )


def refuse_offloading(pipe: Any, denoiser: nn.Module) -> None:
    """`ConfigurationError` where something else already moves the denoiser's weights or wraps its forward."""
    if getattr(pipe, "hf_device_map", None) is not None:
        raise ConfigurationError(
            "The pipeline was loaded with a device_map, which places modules itself. Load it without "
            "device_map."
        )
    for name, module in denoiser.named_modules():
        if hasattr(module, "_hf_hook") or _has_offloading_hook(module):
            raise ConfigurationError(
                f"{name or type(denoiser).__name__} is under CPU or group offloading, which moves the "
                "weights that asyncdiff divides over devices. Load the pipeline without enable_*_offload."
            )


def _has_offloading_hook(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return any("offload" in name for name in getattr(registry, "hooks", {}))


class CapturedCall(BaseException):
    """Ends a pipeline call at its first denoiser call. No `Exception`: a pipeline must not catch it."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call = (args, kwargs)


def capture_call(
    pipe: Any, denoiser: nn.Module, call: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the first denoiser call that `pipe(**call)` makes; the denoiser computes nothing."""

    def stop(*args: Any, **kwargs: Any) -> None:
        raise CapturedCall(args, kwargs)

    with replaced_forward(denoiser, stop), torch.random.fork_rng(), _no_progress_bar(pipe):
        try:
            pipe(**call)
        except CapturedCall as captured:
            return captured.call
    raise ConfigurationError("The example call returned without calling the denoiser.")


@contextmanager
def _no_progress_bar(pipe: Any) -> Iterator[None]:
    """One that stands at 0 of 50 for ever would be left on the screen."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    is_configured = hasattr(pipe, "_progress_bar_config")
    pipe._progress_bar_config = before | {"disable": True}
    try:
        yield
    finally:
        if is_configured:
            pipe._progress_bar_config = before
        else:
            del pipe._progress_bar_config


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Put an instance-level forward in place (None: take one away) and restore what was there."""
    before = vars(module).get("forward")
    vars(module).pop("forward", None)
    if forward is not None:
        module.forward = forward
    try:
        yield
    finally:
        vars(module).pop("forward", None)
        if before is not None:
            module.forward = before

"""Finding a pipeline's denoisers, and calling one as it was before anything was installed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from asyncdiff.errors import ConfigurationError
from asyncdiff.pipeline.timesteps import OTHER_STEP_NAMES, TIMESTEP_NAMES

DENOISER_NAMES = ("unet", "transformer", "transformer_2", "prior", "decoder")
_NAMES_OF_OTHERS_TOO = ("prior", "decoder")
_PIPELINES_INSIDE = ("prior_pipe", "decoder_pipe")


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's denoisers by name, with those of the pipelines that a combined one is made of.

    `ConfigurationError` for what has none or is not a pipeline. Of diffusers 0.42, Wan 2.2 has two that hand
    over, Stable Cascade and unCLIP a prior and a decoder; any may be None. A `prior` or `decoder` counts only
    if its forward takes a timestep: pipelines of other libraries call a part of their autoencoder so.
    """
    found: dict[str, nn.Module] = {}
    for owner in (pipe, *(getattr(pipe, name, None) for name in _PIPELINES_INSIDE)):
        for name in DENOISER_NAMES:
            module = getattr(owner, name, None)
            if isinstance(module, nn.Module) and (name not in _NAMES_OF_OTHERS_TOO or takes_step(module)):
                found.setdefault(name, module)
    if not found:
        raise ConfigurationError(
            f"{type(pipe).__name__} has no denoiser: looked for {', '.join(DENOISER_NAMES[:-1])} and "
            f"{DENOISER_NAMES[-1]}, but {_what_it_has(pipe)}."
        )
    return {name: found[name] for name in DENOISER_NAMES if name in found}


def takes_step(module: nn.Module) -> bool:
    """Whether the forward is told how far the denoising has come."""
    parameters = inspect.signature(module.forward).parameters
    return any(name in parameters for name in (*TIMESTEP_NAMES, *OTHER_STEP_NAMES))


def _what_it_has(pipe: Any) -> str:
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        return "it is no diffusers pipeline"
    return f"it has {', '.join(name for name, part in components.items() if part is not None) or 'nothing'}"


def device_of(denoisers: Iterable[nn.Module]) -> torch.device:
    """Where the denoisers' parameters are; `ConfigurationError` unless they are on one device."""
    devices = set()
    for denoiser in denoisers:
        own = {parameter.device for parameter in denoiser.parameters()}
        if not own:
            raise ConfigurationError(f"{type(denoiser).__name__} has no parameters.")
        devices |= own
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


def refuse_int8(denoiser: nn.Module) -> None:
    """`ConfigurationError` for bitsandbytes' int8 layers: the first call of one takes its weight apart."""
    for name, module in denoiser.named_modules():
        kind = type(module)
        if kind.__name__ == "Linear8bitLt" and kind.__module__.startswith("bitsandbytes"):
            raise ConfigurationError(
                f"{name} has bitsandbytes' int8 weights, which its first call rewrites, so they cannot be "
                "divided over devices. Load the denoiser in 4 bits (BitsAndBytesConfig(load_in_4bit=True)), "
                "with torchao's int8 or from a GGUF file."
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
    """Ends a pipeline call at a denoiser call. No `Exception`: a pipeline must not catch it."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call = (args, kwargs)


def capture_call(
    pipe: Any, denoisers: Iterable[nn.Module], call: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the first denoiser call that `pipe(**call)` makes; the denoiser computes nothing."""

    def stop(*args: Any, **kwargs: Any) -> None:
        raise CapturedCall(args, kwargs)

    captured = call_until_captured(pipe, denoisers, call, stop)
    if captured is None:
        raise ConfigurationError("The example call returned without calling the denoiser.")
    return captured


def call_until_captured(
    pipe: Any, denoisers: Iterable[nn.Module], call: Mapping[str, Any], forward: Callable[..., Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Make `pipe(**call)` with `forward` in the place of every denoiser's, until that raises `CapturedCall`.

    The arguments that it was raised with; None if the pipeline returned before. Random numbers and the
    progress bar are left as they were.
    """
    with ExitStack() as stack:
        for denoiser in denoisers:
            stack.enter_context(replaced_forward(denoiser, forward))
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(_no_progress_bar(pipe))
        try:
            pipe(**call)
        except CapturedCall as captured:
            return captured.call
    return None


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

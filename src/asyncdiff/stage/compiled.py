"""Compiled modules of a stage: those that were compiled on the live denoiser, and blocks where that is asked
for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from asyncdiff.weights.attachments import COMPILE_OPTIONS

_MOST_KINDS = 64


class CompiledForward:
    """The instance-level `forward` of a compiled module, below the stub it may get.

    Not `module.compile()`, which would compile the stub. `is_cut`: stubs are inside the module, which then
    runs uncompiled.
    """

    def __init__(self, module: nn.Module, options: dict[str, Any]) -> None:
        self._eager: Callable[..., Any] = module.forward
        self._compiled = torch.compile(self._eager, **options)
        self.is_cut = False

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._eager)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._eager(*args, **kwargs) if self.is_cut else self._compiled(*args, **kwargs)


def compile_block(module: nn.Module) -> CompiledForward:
    """Compile a module that was not.

    Blocks of one class share their code, and torch gives up on code that it has compiled a few times: a U-Net
    has more kinds of one block than that.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_KINDS)
    forward = vars(module)["forward"] = CompiledForward(module, {})
    return forward


def compile_again(module: nn.Module) -> dict[str, CompiledForward]:
    """By path, the forwards of the modules that were compiled on the original."""
    found = {}
    for path, child in module.named_modules():
        options = vars(child).pop(COMPILE_OPTIONS, None)
        if options is not None:
            found[path] = vars(child)["forward"] = CompiledForward(child, options)
    return found

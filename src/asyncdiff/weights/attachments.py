"""What users attach to modules besides weights: hooks of diffusers, compilation, an attention backend.

None of it can be pickled as it is. What a stage needs to attach it again travels instead. Private APIs used
here: `HookRegistry._fn_refs` and `_hook_order`, `_AttentionBackendRegistry` (diffusers 0.42), the closure of
what `torch.compile` returns (torch 2.13); see tests/weights/test_attachments.py.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn

COMPILE_OPTIONS = "_asyncdiff_compile_options"
"""Attribute of a module in a skeleton: the arguments of `torch.compile` that compiled the original."""

_HOOKS = "_asyncdiff_hooks"
_TORCH_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def without_hooks(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a module whose hooks stay where it is: they run there, around what runs elsewhere."""
    kept = {name: OrderedDict() if name in _TORCH_HOOKS else value for name, value in state.items()}
    kept.pop("_diffusers_hook", None)
    return kept


def has_attachments(module: nn.Module) -> bool:
    """Whether the module needs `portable_state` and `attach`."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    is_renamed = "extra_repr" in vars(module)  # torchao's, of which no copy can be made; only for printing
    is_compiled = module._compiled_call_impl is not None
    return bool(hooks) or hook_registry(module) is not None or is_compiled or is_renamed


def portable_state(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a module, with what `attach` needs in the place of hooked forwards and compiled code."""
    registry = hook_registry(module)
    if registry is not None:
        state = {name: value for name, value in state.items() if name not in ("forward", "_diffusers_hook")}
        inner = innermost_forward(registry)
        if getattr(inner, "__func__", None) is not type(module).forward:
            state["forward"] = inner
        state[_HOOKS] = [(name, _detached(registry.hooks[name])) for name in registry._hook_order]
    state = {name: value for name, value in state.items() if name != "extra_repr"}
    if module._compiled_call_impl is not None:
        state = state | {COMPILE_OPTIONS: compile_options(module._compiled_call_impl)}
    return state


def attach(module: nn.Module, state: dict[str, Any]) -> None:
    """The other half of `portable_state`."""
    hooks = state.pop(_HOOKS, ())
    module.__setstate__(state)
    for name, hook in hooks:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
    if module._forward_hooks or module._forward_pre_hooks:
        vars(module)["forward"] = HookedForward(module)


class HookedForward:
    """Hooks of torch as a part of the instance-level `forward`: they run where the module does, not around
    every stub of it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._forward: Callable[..., Any] = module.forward
        self._hooks = {name: vars(module)[name] for name in _TORCH_HOOKS}
        vars(module).update({name: OrderedDict() for name in _TORCH_HOOKS})

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for number, hook in self._hooks["_forward_pre_hooks"].items():
            if number in self._hooks["_forward_pre_hooks_with_kwargs"]:
                args, kwargs = hook(self._module, args, kwargs) or (args, kwargs)
            elif (changed := hook(self._module, args)) is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
        output = self._forward(*args, **kwargs)
        for number, hook in self._hooks["_forward_hooks"].items():
            has_kwargs = number in self._hooks["_forward_hooks_with_kwargs"]
            given = (args, kwargs, output) if has_kwargs else (args, output)
            changed = hook(self._module, *given)
            output = output if changed is None else changed
        return output


def takes_default_backend(processor: object) -> bool:
    """Whether an attention processor computes with what this process has set as the default."""
    return getattr(processor, "_attention_backend", processor) is None


def default_backend() -> Any:
    """The attention backend that this process has set as the default; other processes know nothing of it."""
    return _AttentionBackendRegistry.get_active_backend()[0]


def hook_registry(module: nn.Module) -> Any:
    """diffusers' registry of the module's hooks; None where there is none with a hook in it."""
    registry = vars(module).get("_diffusers_hook")
    return registry if registry is not None and registry.hooks else None


def innermost_forward(registry: Any) -> Callable[..., Any]:
    """What the hooks are around."""
    first = registry._fn_refs[0]
    return first.forward if first.original_forward is None else first.original_forward


def replace_innermost_forward(registry: Any, forward: Callable[..., Any]) -> None:
    """Put another forward in the middle of the hooks."""
    first = registry._fn_refs[0]
    if first.original_forward is None:
        first.forward = forward
    else:
        first.original_forward = forward


def compile_options(compiled: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that make `torch.compile` do the same again."""
    wrapper: Any = compiled
    cells = dict(zip(wrapper.__code__.co_freevars, wrapper.__closure__, strict=True))
    context, backend = cells["self"].cell_contents, cells["callback"].cell_contents
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    options = {"fullgraph": context.fullgraph, "dynamic": context._dynamic}
    if isinstance(backend, torch._TorchCompileInductorWrapper):
        return options | {"options": dict(backend.config)}
    return options | {"backend": backend.compiler_fn, "options": backend.kwargs.get("options")}


def _detached(hook: Any) -> Any:
    detached = copy.copy(hook)
    detached.fn_ref = None
    return detached

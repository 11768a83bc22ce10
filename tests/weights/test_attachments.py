"""The private interfaces of torch and diffusers that carry hooks, compilation and the attention backend.

They hold for torch 2.13 and diffusers 0.42; where another version breaks them, it is here that it shows.
"""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn

from asyncdiff.weights import dump_skeleton, load_skeleton, named_tensors
from asyncdiff.weights.attachments import COMPILE_OPTIONS, compile_options, innermost_forward


class Doubled(ModelHook):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output * 2


class Replaced(ModelHook):
    def new_forward(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.fn_ref.original_forward(x) + 1


def double(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 2


def negate(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return tuple(-arg for arg in args), kwargs


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


def copy_of(module: nn.Module) -> nn.Module:
    skeleton = pickle.loads(pickle.dumps(dump_skeleton(module, allow_main=True)))
    return load_skeleton(skeleton, dict(named_tensors(module)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"backend": "eager", "fullgraph": True},
        {"mode": "max-autotune-no-cudagraphs", "dynamic": True},
        {"options": {"max_autotune": True}, "dynamic": False},
    ],
    ids=str,
)
def test_compile_options_are_found_and_make_the_same_again(options: dict[str, Any]) -> None:
    module = model()
    module[0].compile(**options)
    found = compile_options(module[0]._compiled_call_impl)
    assert found["fullgraph"] is options.get("fullgraph", False)
    assert found["dynamic"] is options.get("dynamic")
    assert (found.get("backend") is not None) == ("backend" in options)
    assert bool(found["options"]) == ("mode" in options or "options" in options)
    carried = vars(copy_of(module)[0])[COMPILE_OPTIONS]
    assert carried == found
    module[1].compile(**carried)
    assert compile_options(module[1]._compiled_call_impl) == found


@pytest.mark.parametrize("hooks", [[Doubled], [Replaced], [Doubled, Replaced], [Replaced, Doubled, Doubled]])
def test_hooks_of_diffusers_are_registered_again_in_their_order(hooks: list[type[ModelHook]]) -> None:
    module, x = model(), torch.randn(2, 3)
    plain = module(x)
    registry = HookRegistry.check_if_exists_or_initialize(module[0])
    for number, hook in enumerate(hooks):
        registry.register_hook(hook(), str(number))
    assert innermost_forward(registry).__func__ is nn.Linear.forward
    copied = copy_of(module)
    assert torch.equal(copied(x), module(x))
    assert not torch.equal(copied(x), plain)
    for number in reversed(range(len(hooks))):
        copied[0]._diffusers_hook.remove_hook(str(number))
    assert torch.equal(copied(x), plain)


def test_hooks_of_torch_become_a_part_of_the_forward() -> None:
    module, x = model(), torch.randn(2, 3)
    module[0].register_forward_hook(double)
    module[1].register_forward_pre_hook(negate, with_kwargs=True)
    copied = copy_of(module)
    assert torch.equal(copied(x), module(x))
    assert torch.equal(copied[0].forward(x), module[0](x))
    assert not copied[0]._forward_hooks


def test_hooks_of_the_module_itself_stay_behind() -> None:
    module, x = model(), torch.randn(2, 3)
    plain = module(x)
    module.register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(copy_of(module)(x), plain)


def test_default_attention_backend_travels() -> None:
    """Another process has its own default."""
    module = nn.Linear(1, 1)
    module.processor = FluxAttnProcessor()
    with attention_backend("_native_math"):
        copied = copy_of(nn.Sequential(module))
    assert copied[0].processor._attention_backend == "_native_math"
    assert module.processor._attention_backend is None

"""What can be shipped to another process, what is refused, and what comes back from a file."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import is_running
from tiny_pipelines import generate, tiny_pipeline, tiny_unet
from torch import nn

import asyncdiff
from asyncdiff.errors import ConfigurationError
from asyncdiff.weights import (
    assign_tensors,
    dump_skeleton,
    find_checkpoint,
    free_tensors,
    load_skeleton,
    named_tensors,
    resident_bytes,
)
from asyncdiff.weights.source import checksum


class Tied(nn.Module):
    """Two names for one weight, a buffer, and a parameter that asks for no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.norm.weight.requires_grad_(False)
        self.note = "kept"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(self.first(x)))


def test_skeleton_carries_everything_but_the_values() -> None:
    module = Tied().eval()
    skeleton = pickle.loads(pickle.dumps(dump_skeleton(module, allow_main=True)))
    copied = load_skeleton(skeleton, dict(named_tensors(module)))
    assert copied.note == "kept"
    assert copied.second.weight is copied.first.weight
    assert not copied.norm.weight.requires_grad
    x = torch.randn(3, 4)
    assert torch.equal(copied(x), module(x))
    assert len(skeleton.payload) < 8000
    empty = load_skeleton(skeleton, {}, "cpu")
    assert resident_bytes(empty) == 4, "one element, so that the module knows its device"
    assert next(empty.parameters()).device == torch.device("cpu")


def test_freed_tensors_hold_no_memory_and_come_back() -> None:
    module = Tied().eval()
    before, x = copy.deepcopy(module), torch.randn(3, 4)
    freed = free_tensors(module, [name for name, _ in named_tensors(module)])
    assert resident_bytes(module) == 4
    assert next(module.parameters()).device == torch.device("cpu")
    assign_tensors(module, freed)
    assert module.second.weight is module.first.weight
    assert torch.equal(module(x), before(x))


def test_hook_that_cannot_be_pickled_is_refused_and_the_pipeline_stays_whole() -> None:
    pipe = tiny_pipeline()
    plain = generate(pipe)
    hook = pipe.unet.conv_in.register_forward_hook(lambda *args: None)
    handle = asyncdiff.parallelize(pipe, devices=["cpu", "cpu"])
    with pytest.raises(ConfigurationError, match="cannot be shipped to other processes"):
        generate(pipe)
    hook.remove()
    assert resident_bytes(pipe.unet) == sum(tensor.nbytes for _, tensor in named_tensors(pipe.unet))
    handle.remove()
    assert not is_running(handle.workers[0].pid)
    assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("kind", ["class", "function"])
def test_object_of_the_main_module_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def own_function() -> None: ...

    class OwnLayer(nn.Linear): ...

    for thing in (own_function, OwnLayer):
        thing.__module__ = "__main__"
        thing.__qualname__ = thing.__name__
        monkeypatch.setattr(sys.modules["__main__"], thing.__name__, thing, raising=False)
    module: Any = nn.Sequential(nn.Linear(2, 2))
    if kind == "class":
        module.append(OwnLayer(2, 2))
    else:
        module.processor = own_function
    name = "OwnLayer" if kind == "class" else "own_function"
    with pytest.raises(ConfigurationError, match=f"{name} is defined in the running script"):
        dump_skeleton(module)
    assert dump_skeleton(module, allow_main=True).payload


def test_file_gives_back_only_what_it_really_holds(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path)
    unet = type(tiny_unet()).from_pretrained(tmp_path)
    checkpoint = find_checkpoint(unet)
    assert checkpoint is not None
    weight = unet.conv_in.weight
    assert torch.equal(checkpoint.read_like("conv_in.weight", weight, checksum([weight])), weight)
    changed = weight + 1  # a fused LoRA
    assert checkpoint.read_like("conv_in.weight", changed, checksum([changed])) is None
    half = weight.bfloat16()
    assert torch.equal(checkpoint.read_like("conv_in.weight", half, checksum([half])), half)
    assert checkpoint.read_like("no.such.weight", weight, checksum([weight])) is None
    assert find_checkpoint(tiny_unet()) is None


def test_checksum_does_not_depend_on_strides() -> None:
    tensor = torch.randn(4, 6)
    assert checksum([tensor.t().contiguous().t()]) == checksum([tensor])
    assert checksum([tensor + 1]) != checksum([tensor])
    assert checksum([tensor.bfloat16()]) != checksum([tensor])

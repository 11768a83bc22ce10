"""LoRA, before the split, travels with the weights."""

from __future__ import annotations

import pytest
import torch
from denoisers import BY_NAME, build
from peft import LoraConfig
from splitting import Split, assert_bitwise, cut, inputs_of, whole

from asyncdiff.trace import find_blocks, record
from asyncdiff.weights import dump_skeleton, load_skeleton


@pytest.mark.parametrize(
    ("name", "argument"), [("SD2.1", "cross_attention_kwargs"), ("Flux", "joint_attention_kwargs")]
)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_lora_is_bitwise_and_its_scale_does_not_leak(name, argument, scale):
    case = BY_NAME[name]
    module = build(case)
    module.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "proj_out"], init_lora_weights=False))
    module.eval()
    kwargs = case.inputs(1, 16)
    if scale is not None:
        kwargs[argument] = {"scale": scale}
    expected = whole(module, kwargs)
    recording = record(load_skeleton(dump_skeleton(module), {}), inputs_of(module, kwargs), device="cpu")
    graph = find_blocks(recording, 3)
    split = Split(module, recording, graph, cut(graph, "chain", 3))
    for _ in range(2):  # an early exit that left the scale behind would show in the second run
        assert_bitwise(split.run(inputs_of(module, kwargs)), expected)
    module.disable_adapters()
    assert not torch.equal(whole(module, kwargs)[0], expected[0])

"""The trace finds the same graph with and without data, and leaves the live denoiser alone."""

from __future__ import annotations

import pytest
import torch
from denoisers import BY_NAME, CASES, build
from splitting import Split, assert_bitwise, cut, inputs_of, whole
from torch import nn

from asyncdiff.trace import call_costs, find_blocks, record
from asyncdiff.weights import dump_skeleton, load_skeleton


def facts(graph):
    return [
        (b.key, b.reads, b.inputs, b.glue_uses, b.outputs, b.parameter_bytes, b.flops) for b in graph.blocks
    ]


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
def test_traces_without_and_with_weights_give_the_same_graph(case):
    module = build(case)
    inputs = inputs_of(module, case.inputs(2, 16))
    weightless = record(load_skeleton(dump_skeleton(module), {}), inputs, device="cpu", modes=[case.mode])
    real = record(module, inputs, device="cpu", live=True, modes=["real"])
    assert (weightless.mode, real.mode) == (case.mode, "real")
    graphs = [find_blocks(recording, 3) for recording in (weightless, real)]
    assert facts(graphs[0]) == facts(graphs[1])
    if case.mode != "hollow":  # with weights that are all alike, every token goes to the same experts
        assert graphs[0] == graphs[1]


@pytest.mark.parametrize("mode", ["fake", "mixed", "real"])
@pytest.mark.parametrize("name", ["SD1.5+T2I-Adapter", "Wan"])
def test_a_live_denoiser_is_left_as_it_was(name, mode):
    case = BY_NAME[name]
    module = build(case)
    kwargs = case.inputs(2, 16)
    inputs = inputs_of(module, kwargs)
    expected = whole(module, kwargs)
    attributes = [(owner, dict(vars(owner))) for owner in module.modules()]
    tensors = {
        name: (id(tensor), tensor.clone()) for name, tensor in module.state_dict(keep_vars=True).items()
    }
    values = {name: tensor.clone() for name, tensor in inputs.tensors().items()}
    assert record(module, inputs, device="cpu", live=True, modes=[mode]).mode == mode
    assert all(vars(owner) == before for owner, before in attributes)
    for name, tensor in module.state_dict(keep_vars=True).items():
        assert id(tensor) == tensors[name][0]
        assert torch.equal(tensor, tensors[name][1])
    assert all(torch.equal(tensor, values[name]) for name, tensor in inputs.tensors().items())
    assert_bitwise(whole(module, kwargs), expected)


class Masked(nn.Module):
    """Takes a length from its mask, as Lumina2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, sample, mask):
        length = max(mask.sum(1).tolist())
        for layer in self.layers:
            sample = torch.tanh(layer(sample[:, :length]))
        return sample


class Selecting(nn.Module):
    """A layer that looks at the values of its activations, as HiDream's experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SelectingLayer() for _ in range(4))

    def forward(self, sample):
        for layer in self.layers:
            sample = layer(sample)
        return sample


class SelectingLayer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, input):
        out = super().forward(input)
        chosen = (out[:, 0] > 0).nonzero()[:, 0]
        out[chosen] = -out[chosen]
        return out


def test_values_of_a_mask_are_looked_at_with_only_weights_and_latents_fake():
    torch.manual_seed(0)
    module = Masked()
    kwargs = {"sample": torch.randn(2, 5, 8), "mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])}
    inputs = inputs_of(module, kwargs)
    recording = record(load_skeleton(dump_skeleton(module, allow_main=True), {}), inputs, device="cpu")
    assert recording.mode == "mixed"
    assert recording.steering_inputs == {"mask"}
    graph = find_blocks(recording, 2)
    split = Split(module, recording, graph, cut(graph, "chain", 2))
    assert [spec.needed_inputs for spec in split.specs["key"]] == [("sample", "mask"), ("mask",)]
    assert_bitwise(split.run(inputs), whole(module, kwargs))


def test_blocks_that_look_at_activations_are_traced_with_real_weights():
    torch.manual_seed(0)
    module = Selecting()
    kwargs = {"sample": torch.randn(6, 8)}
    recording = record(module, inputs_of(module, kwargs), device="cpu", live=True)
    assert recording.mode == "real"
    graph = find_blocks(recording, 2)
    split = Split(module, recording, graph, cut(graph, "chain", 2))
    assert_bitwise(split.run(inputs_of(module, kwargs)), whole(module, kwargs))


def test_blocks_that_look_at_activations_are_traced_without_weights():
    torch.manual_seed(0)
    module = Selecting()
    kwargs = {"sample": torch.randn(6, 8)}
    inputs = inputs_of(module, kwargs)
    skeleton = load_skeleton(dump_skeleton(module, allow_main=True), {})
    recording = record(skeleton, inputs, device="cpu")
    assert recording.mode == "hollow"
    assert all(tensor.untyped_storage().nbytes() == 4 for tensor in skeleton.parameters())
    assert not recording.steering_inputs  # its activations steer, at every step anew
    graph = find_blocks(recording, 2)
    split = Split(module, recording, graph, cut(graph, "chain", 2))
    assert_bitwise(split.run(inputs), whole(module, kwargs))


def test_a_hooked_denoiser_is_traced_as_it_runs():
    """A copy would silently run the original's weights: it must not be copied."""
    torch.manual_seed(0)
    module = Selecting()
    layer = module.layers[1]
    original = layer.forward
    layer.forward = lambda *args, **kwargs: original(*args, **kwargs) * 2
    hook = layer.forward
    kwargs = {"sample": torch.randn(6, 8)}
    recording = record(module, inputs_of(module, kwargs), device="cpu", live=True)
    assert recording.mode == "real"
    assert vars(layer)["forward"] is hook
    assert len(find_blocks(recording, 2).blocks) == 4


def test_flops_are_those_of_torch():
    from torch.utils.flop_counter import FlopCounterMode

    case = BY_NAME["SD2.1"]
    module = build(case)
    kwargs = case.inputs(2, 16)
    graph = find_blocks(record(module, inputs_of(module, kwargs), device="cpu", live=True), 2)
    module.set_default_attn_processor()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**kwargs)
    ours = sum(block.flops for block in graph.blocks) + graph.glue_flops
    attention = sum(flops for op, flops in attention_flops(module, kwargs))
    assert ours == counter.get_total_flops() + attention


def attention_flops(module, kwargs):
    """torch 2.13 counts nothing for the CPU's fused attention: query x key and weights x value, by hand."""
    found = []

    def note(query, key, value, *_args, **_kwargs):
        b, h, s, d = query.shape
        found.append(("attention", 4 * b * h * s * key.shape[2] * d))
        return original(query, key, value, *_args, **_kwargs)

    original = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = note
    try:
        with torch.no_grad():
            module(**kwargs)
    finally:
        nn.functional.scaled_dot_product_attention = original
    return found


def test_candidate_calls_are_nested_and_cover_the_work():
    case = BY_NAME["SD2.1"]
    module = build(case)
    recording = record(module, inputs_of(module, case.inputs(2, 16)), device="cpu", live=True)
    costs = call_costs(recording)
    outermost = sum(cost.flops for cost in costs.values() if cost.parent is None)
    graph = find_blocks(recording, 2)
    assert outermost + graph.glue_flops == recording.work[0][0]
    for key, cost in costs.items():
        if cost.parent is not None:
            assert key.path.startswith(cost.parent.path + ".")
            assert cost.flops <= costs[cost.parent].flops

"""Corners that small modules reach more surely than real classes do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from splitting import Split, assert_bitwise, cut, inputs_of, stage_copy, whole
from torch import nn

from asyncdiff.graph import Atom, Partition
from asyncdiff.stage import StageReplica, stage_spec
from asyncdiff.trace import find_blocks, record


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Toy(nn.Module):
    layer: type[nn.Module] = Layer

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.layer() for _ in range(4))

    def forward(self, sample, scale=1.0):
        for layer in self.layers:
            sample = layer(sample)
        return sample * scale


class Twice(Toy):
    """Every layer is called twice: the second time perhaps on another stage."""

    def forward(self, sample):
        for _ in range(2):
            sample = super().forward(sample)
        return sample


class ResidualInGlue(Toy):
    """Every earlier output is read by every later layer."""

    def forward(self, sample):
        for layer in self.layers:
            sample = sample + layer(sample)
        return sample


class SameTensorTwiceLayer(Layer):
    def forward(self, x, *_):
        x = super().forward(x)
        return x, (x, x.view(-1, 2, 4))


class SameTensorTwice(Toy):
    """One tensor in two leaves, written in place by glue, as with T2I-Adapter."""

    layer = SameTensorTwiceLayer

    def forward(self, sample):
        skips = []
        for layer in self.layers:
            sample, (skip, _) = layer(sample)
            sample += 1
            skips.append(skip)
        return sum(skips)


class PassingLayer(Layer):
    def forward(self, x, context, flag=True):
        return {"context": context, "x": super().forward(x), "count": 3, "nothing": None}


class Passing(Toy):
    """An argument comes back unchanged, as from Mochi's last block; with constants and None beside it."""

    layer = PassingLayer

    def forward(self, sample, context):
        for layer in self.layers:
            out = layer(sample, context=context)
            assert out["count"] == 3
            assert out["nothing"] is None
            sample, context = out["x"], out["context"]
        return sample + context


class LookedInto(Toy):
    """Glue looks at attributes of a foreign module and calls a part of it."""

    def forward(self, sample):
        for layer in self.layers:
            sample = layer(sample) * len(list(layer.children())) + self.layers[0].linear(torch.ones(1, 8))
        return sample


class Tied(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.layers[3].linear.weight = self.layers[0].linear.weight


class ScaledArgumentLayer(Layer):
    def forward(self, x):
        x[:, :4] = x[:, :4] * 2  # FreeU does this
        return self.linear(x)


class ScaledArgument(Toy):
    layer = ScaledArgumentLayer

    def forward(self, sample):
        return super().forward(sample * 1)


class InPlaceGlue(Toy):
    def forward(self, sample):
        first = None
        for layer in self.layers:
            sample = layer(sample)
            first = sample if first is None else first
            sample = sample + first
            first += 0.5
        return sample


class WritesItsInput(Toy):
    def forward(self, sample):
        sample *= 2
        return super().forward(sample)


class Swallowing(Toy):
    """Catches every Exception of its layers: the early exit must get through."""

    def forward(self, sample):
        for layer in self.layers:
            try:
                sample = layer(sample)
            except Exception:  # noqa: BLE001
                sample = sample * 0
        return sample


@pytest.mark.parametrize(
    "toy",
    [
        Toy,
        Twice,
        ResidualInGlue,
        SameTensorTwice,
        Passing,
        LookedInto,
        Tied,
        ScaledArgument,
        InPlaceGlue,
        Swallowing,
        WritesItsInput,
    ],
)
@pytest.mark.parametrize(("kind", "num_stages"), [("chain", 2), ("chain", 4), ("nested", 2), ("nested", 3)])
def test_split_is_bitwise_the_unsplit_module(toy, kind, num_stages):
    torch.manual_seed(0)
    module = toy()
    kwargs = {"sample": torch.randn(2, 8)} | ({"context": torch.randn(2, 8)} if toy is Passing else {})
    recording = record(module, inputs_of(module, kwargs), device="cpu", live=True)
    graph = find_blocks(recording, num_stages, kind=kind)
    assert len(graph.blocks) >= 4
    for fresh in (False, True):
        split = Split(module, recording, graph, cut(graph, kind, num_stages), fresh=fresh)
        for _ in range(2):
            assert_bitwise(split.run(inputs_of(module, kwargs)), whole(module, kwargs))


def test_a_leaf_that_glue_writes_into_is_emitted_as_the_block_made_it():
    """Captured by reference it would be overwritten before it is sent."""
    torch.manual_seed(0)
    module = InPlaceGlue()
    kwargs = {"sample": torch.randn(2, 8)}
    recording = record(module, inputs_of(module, kwargs), device="cpu", live=True)
    graph = find_blocks(recording, 2)
    spec = stage_spec(recording, graph, cut(graph, "chain", 2), 0)
    replica = StageReplica(stage_copy(module, spec))
    replica.prepare(0, spec)
    emitted: dict[Atom, torch.Tensor] = {}
    replica.run(0, kwargs, {}, lambda *_: pytest.fail("reads nothing"), emitted.__setitem__)
    with torch.no_grad():
        first = module.layers[0](kwargs["sample"])
    assert torch.equal(emitted[Atom("layers.0", 0, 0)], first)


def test_what_is_received_is_not_written_into():
    """A stale value may be read again at the next step."""
    torch.manual_seed(0)
    module = InPlaceGlue()
    kwargs = {"sample": torch.randn(2, 8)}
    recording = record(module, inputs_of(module, kwargs), device="cpu", live=True)
    graph = find_blocks(recording, 2)
    spec = stage_spec(recording, graph, cut(graph, "chain", 2), 1)
    replica = StageReplica(stage_copy(module, spec))
    replica.prepare(0, spec)
    values = {atom: torch.randn(2, 8) for atom in spec.reads[1]}
    before = {atom: value.clone() for atom, value in values.items()}
    replica.run(0, {}, {}, lambda _, atom, out: values[atom], lambda *_: None)
    assert all(torch.equal(values[atom], before[atom]) for atom in values)


def test_an_input_that_is_written_into_may_be_given_again():
    torch.manual_seed(0)
    module = WritesItsInput()
    kwargs = {"sample": torch.randn(2, 8)}
    recording = record(module, inputs_of(module, kwargs), device="cpu", live=True)
    graph = find_blocks(recording, 2)
    spec = stage_spec(recording, graph, cut(graph, "chain", 2), 0)
    replica = StageReplica(stage_copy(module, spec))
    replica.prepare("key", spec)
    before = kwargs["sample"].clone()
    (_, first), (_, second) = run(replica, kwargs), run(replica, kwargs)
    assert torch.equal(first[0][1], second[0][1])
    assert torch.equal(kwargs["sample"], before)


def prepared():
    torch.manual_seed(0)
    module = Toy()
    kwargs = {"sample": torch.randn(2, 8)}
    recording = record(module, inputs_of(module, kwargs), device="cpu", live=True)
    graph = find_blocks(recording, 2)
    spec = stage_spec(recording, graph, cut(graph, "chain", 2), 0)
    replica = StageReplica(module)
    replica.prepare("key", spec)
    return module, kwargs, replica, spec


def run(replica, kwargs):
    emitted: list[tuple[Atom, torch.Tensor]] = []
    out = replica.run(
        "key", kwargs, {}, lambda *_: pytest.fail("reads nothing"), lambda *pair: emitted.append(pair)
    )
    return out, emitted


def test_the_first_stage_ends_before_the_output():
    _, kwargs, replica, _ = prepared()
    out, emitted = run(replica, kwargs)
    assert out is None
    assert [atom for atom, _ in emitted] == [Atom("layers.1", 0, 0)]


def test_remove_leaves_the_module_as_it_was():
    module, kwargs, replica, _ = prepared()
    run(replica, kwargs)
    replica.remove()
    assert not any("forward" in vars(owner) for owner in module.modules())


def test_a_hook_stays_inside_and_comes_back():
    _, _, _, spec = prepared()
    calls = []
    fresh = Toy()
    original = Layer.forward
    hooked = lambda x: calls.append(1) or original(fresh.layers[0], x)  # noqa: E731
    fresh.layers[0].forward = hooked
    replica = StageReplica(fresh)
    replica.prepare("key", spec)
    run(replica, {"sample": torch.randn(2, 8)})
    assert calls == [1]
    replica.remove()
    assert vars(fresh.layers[0])["forward"] is hooked


def test_outside_a_run_the_module_is_itself():
    module, kwargs, _, _ = prepared()
    torch.manual_seed(0)
    assert_bitwise(whole(module, kwargs), whole(Toy(), kwargs))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda replica: pickle.loads(pickle.dumps(replica))])
def test_a_replica_copies_with_its_stubs_and_runs_its_own_weights(duplicate):
    module, kwargs, replica, _ = prepared()
    _, before = run(replica, kwargs)
    other = duplicate(replica)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    _, after = run(other, kwargs)
    assert torch.equal(after[0][1], before[0][1])


def test_an_error_in_a_block_reaches_the_caller_and_the_next_run_works():
    _, kwargs, replica, _ = prepared()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(replica, {"sample": torch.randn(2, 3)})
    _, emitted = run(replica, kwargs)
    assert len(emitted) == 1


def test_a_forward_that_takes_another_way_is_an_error():
    module, kwargs, replica, _ = prepared()
    module.layers.append(module.layers[0])  # now called once more
    module.layers.insert(0, module.layers[0])
    with pytest.raises(RuntimeError, match="took another way"):
        run(replica, kwargs)


def test_two_blocks_on_one_stage_hand_over_nothing():
    module = Toy()
    recording = record(module, inputs_of(module, {"sample": torch.randn(2, 8)}), device="cpu", live=True)
    graph = find_blocks(recording, 1)
    keys = tuple(block.key for block in graph.blocks)
    spec = stage_spec(recording, graph, Partition("chain", (keys,)), 0)
    assert spec.emits == ()
    assert spec.reads == {0: ()}
    assert spec.returns_output

"""What cannot be split is found by the trace and refused by name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from splitting import inputs_of
from torch import nn

from asyncdiff.errors import UnsupportedDenoiserError
from asyncdiff.trace import find_blocks, record
from asyncdiff.weights import dump_skeleton, load_skeleton


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Toy(nn.Module):
    """Four layers; the subclasses do one thing that cannot be split."""

    def __init__(self, layer: type[nn.Module] = Layer, num_layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(num_layers))

    def forward(self, sample):
        for layer in self.layers:
            sample = self.step(layer, sample)
        return sample

    def step(self, layer, sample):
        return layer(sample)


class Branches(Toy):
    def step(self, layer, sample):
        sample = layer(sample)
        return sample if sample.mean() > 0 else -sample


class Peeks(Toy):
    """Its glue does by the latents, which are others at every step."""

    def step(self, layer, sample):
        return layer(sample)

    def forward(self, sample):
        scale = 2.0 if sample.mean() > 0 else 1.0
        return super().forward(sample) * scale


class Calibrated(Toy):
    """Looks at the values of a weight."""

    def step(self, layer, sample):
        assert layer.linear.weight.std() > 0
        return layer(sample)


class Hurries(Toy):
    """Leaves out what it does by the timestep."""

    def forward(self, sample, timestep):
        return super().forward(sample) if timestep > 500 else self.layers[0](sample)


class Lists(Toy):
    def step(self, layer, sample):
        return layer(sample) * float(torch.tensor(layer(sample).tolist()).sum())


class SideLayer(Layer):
    def forward(self, x):
        self.extra = self.linear(x)
        return torch.tanh(self.extra)


class Side(Toy):
    def __init__(self) -> None:
        super().__init__(SideLayer)

    def step(self, layer, sample):
        return layer(sample) + layer.extra


class AppendingLayer(Layer):
    def forward(self, x, found):
        found.append(self.linear(x))
        return torch.tanh(found[-1])


class Appending(Toy):
    def __init__(self) -> None:
        super().__init__(AppendingLayer)

    def forward(self, sample):
        found: list[torch.Tensor] = []
        for layer in self.layers:
            sample = layer(sample, found)
        return sample + sum(found)


class CountingLayer(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class Counting(Toy):
    def __init__(self) -> None:
        super().__init__(CountingLayer)


class KeepingLayer(Layer):
    """A cache that the next forward reads."""

    def forward(self, x):
        before = getattr(self, "cache", None)
        self.cache = self.linear(x)
        return torch.tanh(self.cache if before is None else self.cache + before)


class Keeping(Toy):
    def __init__(self) -> None:
        super().__init__(KeepingLayer)


class NoisyLayer(Layer):
    def forward(self, x):
        return super().forward(x) + torch.randn_like(x)


class Noisy(Toy):
    def __init__(self) -> None:
        super().__init__(NoisyLayer)


class DroppingLayer(Layer):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.1, training=self.training)


@dataclass
class Unregistered:
    sample: torch.Tensor


class UnregisteredLayer(Layer):
    def forward(self, x):
        return Unregistered(super().forward(x))


class Opaque(Toy):
    def __init__(self) -> None:
        super().__init__(UnregisteredLayer)

    def step(self, layer, sample):
        return layer(sample).sample


class ReturningInPlaceLayer(Layer):
    def forward(self, x):
        return x.add_(self.linear(x))


class ReturningInPlace(Toy):
    def __init__(self) -> None:
        super().__init__(ReturningInPlaceLayer)

    def forward(self, sample):
        return super().forward(sample * 1)


class ViewLayer(Layer):
    def forward(self, x):
        return x[:, :4], super().forward(x)


class ViewsWritten(Toy):
    """Glue writes through a view that a layer returned of its argument, and goes on with the argument."""

    def __init__(self) -> None:
        super().__init__(ViewLayer)

    def step(self, layer, sample):
        sample = sample * 1
        view, out = layer(sample)
        view += 1
        return sample + out


def blocks_of(module, num_stages=2, live=True):
    inputs = inputs_of(module, {"sample": torch.randn(2, 8)})
    if live:
        return find_blocks(record(module, inputs, device="cpu", live=True), num_stages)
    skeleton = load_skeleton(dump_skeleton(module, allow_main=True), {})
    return find_blocks(record(skeleton, inputs, device="cpu"), num_stages)


@pytest.mark.parametrize(
    ("toy", "module_named", "reason"),
    [
        (Branches, "denoiser itself", "looks at the values of a block's output"),
        (Lists, "denoiser itself", "looks at the values of a block's output"),
        (Peeks, "denoiser itself", "looks at the values of the latents"),
        (Side, "layers.0", "by a side door"),
        (Appending, "layers.0", "by a side door"),
        (Counting, "layers.0", "writes in place into a parameter, buffer or input"),
        (Keeping, "layers.0", "keeps an activation from one forward to the next in its attribute 'cache'"),
        (Noisy, "layers.0", "draws random numbers"),
        (lambda: Toy(DroppingLayer).train(), "layers.0", "draws random numbers"),
        (Opaque, "layers.0", "hides its tensors from pytree"),
        (ReturningInPlace, "layers.0", "writes in place into a tensor made outside it and returns it"),
        (ViewsWritten, "layers.0", "returns a view of a tensor that is written in place later"),
    ],
)
def test_is_refused_by_name(toy, module_named, reason):
    with pytest.raises(UnsupportedDenoiserError) as refusal:
        blocks_of(toy().requires_grad_(False))
    assert module_named in str(refusal.value)
    assert reason in str(refusal.value)


def test_a_timestep_that_steers_is_refused():
    module = Hurries()
    inputs = inputs_of(module, {"sample": torch.randn(2, 8), "timestep": torch.tensor(999.0)})
    recording = record(module, inputs, device="cpu", live=True)
    with pytest.raises(UnsupportedDenoiserError, match="value of its input 'timestep'"):
        find_blocks(recording, 2)


def test_too_few_blocks_are_refused_with_the_number():
    with pytest.raises(UnsupportedDenoiserError, match=r"num_stages=5 .* only be cut into 4"):
        blocks_of(Toy(), 5)


def test_dropout_in_eval_mode_is_no_randomness():
    assert len(blocks_of(Toy(DroppingLayer).eval()).blocks) == 4


@pytest.mark.parametrize("toy", [Branches, Lists, Side, Noisy])
def test_is_refused_for_the_same_reason_without_weights(toy):
    with pytest.raises(UnsupportedDenoiserError) as refusal:
        blocks_of(toy())
    with pytest.raises(UnsupportedDenoiserError) as weightless_refusal:
        blocks_of(toy(), live=False)
    assert str(weightless_refusal.value) == str(refusal.value)


def test_a_forward_that_looks_at_weights_needs_the_loaded_model():
    with pytest.raises(UnsupportedDenoiserError, match="without its weights"):
        blocks_of(Calibrated(), live=False)
    assert len(blocks_of(Calibrated()).blocks) == 4


def test_a_denoiser_called_without_tensors_is_refused():
    with pytest.raises(UnsupportedDenoiserError, match="without any tensor"):
        inputs_of(Toy(), {"sample": 1})


class Pair(nn.Module):
    """A container whose parts hang together by a side door."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([SideLayer(), Layer()])

    def forward(self, x):
        out = self.parts[1](self.parts[0](x)) + self.parts[0].extra
        del self.parts[0].extra
        return out


class Pairs(Toy):
    def __init__(self) -> None:
        super().__init__(Pair)


def test_inseparable_parts_stay_in_one_block():
    graph = blocks_of(Pairs(), 3)
    assert [block.key.path for block in graph.blocks] == [f"layers.{i}" for i in range(4)]


def test_the_refusal_of_too_many_stages_names_what_hangs_together():
    with pytest.raises(UnsupportedDenoiserError, match=r"'layers.0' cannot be opened.*side door"):
        blocks_of(Pairs(), 5)

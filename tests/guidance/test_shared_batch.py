"""Which inputs carry the batch is found by tracing, not from names; and who mixes samples is found out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from asyncdiff.guidance import PartsMemory, find_shared_batch
from asyncdiff.pipeline.denoiser import capture_call
from asyncdiff.tiny import TINY_PIPELINES, TinyCall
from asyncdiff.trace import Inputs, flatten_inputs
from asyncdiff.weights import dump_skeleton

CPU = torch.device("cpu")


def call_of(family: str, call: TinyCall | None = None) -> tuple[nn.Module, Inputs]:
    """The first denoiser call of a tiny pipeline."""
    stand_in = TINY_PIPELINES[family]
    pipe = stand_in.build()
    denoiser = getattr(pipe, stand_in.denoisers[0])
    args, kwargs = capture_call(pipe, [denoiser], stand_in.arguments(call or TinyCall()))
    return denoiser, flatten_inputs(type(denoiser).forward, args, kwargs)


def carriers(denoiser: nn.Module, inputs: Inputs, num_parts: int = 2) -> set[str] | None:
    shared = find_shared_batch(dump_skeleton(denoiser), inputs, num_parts, CPU)
    return None if shared is None else set(shared.carriers)


@pytest.mark.parametrize(
    ("family", "shared"),
    [
        ("sd15", {"timestep"}),
        ("sdxl", {"timestep"}),
        ("sd3", set()),
        ("controlnet-sd15", {"timestep"}),
        ("svd", {"timestep"}),
        ("animatediff", {"timestep"}),
        ("pixart-alpha", set()),
    ],
)
def test_inputs_that_carry_the_batch_of_guidance(family: str, shared: set[str]) -> None:
    """All but the timestep of U-Nets; in AnimateDiff the prompt too, which is there once for every frame."""
    denoiser, inputs = call_of(family)
    assert carriers(denoiser, inputs) == inputs.tensors().keys() - shared


@pytest.mark.parametrize("family", ["flux", "flux2"])
def test_ids_of_tokens_are_for_all_samples(family: str) -> None:
    """In FLUX.2 every sample has some, of which the first sample's are used for all."""
    denoiser, inputs = call_of(family, TinyCall(batch=2))
    assert carriers(denoiser, inputs) == inputs.tensors().keys() - {"img_ids", "txt_ids"}


def test_as_many_parts_as_the_batch_is_a_multiple_of() -> None:
    denoiser, inputs = call_of("sd15", TinyCall(batch=3))  # of which guidance makes 6
    assert inputs.tensors()["sample"].shape[0] == 6
    assert (
        carriers(denoiser, inputs, 2) == carriers(denoiser, inputs, 3) == {"sample", "encoder_hidden_states"}
    )
    assert carriers(denoiser, inputs, 4) is None


@pytest.mark.parametrize(
    "family", ["z-image", *(pytest.param(name, marks=pytest.mark.wide) for name in ("hidream", "mochi"))]
)
def test_batch_that_is_no_dim_0_or_is_gone_through_one_by_one_is_left_together(family: str) -> None:
    """A list of samples; the batch in dim 1; a loop over the samples, which might do anything."""
    denoiser, inputs = call_of(family)
    assert carriers(denoiser, inputs) is None


# -- toys ----------------------------------------------------------------------------------------------------


class Toy(ModelMixin, ConfigMixin):
    """A linear layer, and whatever `then` makes of what it returns and a condition."""

    @register_to_config
    def __init__(self, then: str = "add_per_sample") -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return THEN[self.config.then](self.layer(sample), condition)


THEN: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add_per_sample": lambda x, condition: x + condition[:, None],
    "add_table": lambda x, condition: x @ condition.T @ condition,
    "subtract_mean": lambda x, condition: x - x.mean(0) + condition[:, None],
    "use_first": lambda x, condition: x + condition[0],
    "use_half": lambda x, condition: x + torch.cat([condition.chunk(2)[1]] * 2)[: len(x), None],
    "drop_a_sample": lambda x, condition: (x + condition[:, None])[1:],
    "tuple": lambda x, condition: (x, condition.sum(-1)),
}


def toy_call(then: str) -> tuple[nn.Module, Inputs]:
    toy = Toy(then).eval()
    inputs = {"sample": torch.randn(2, 3, 4), "timestep": torch.tensor(5), "condition": torch.randn(2, 4)}
    return toy, flatten_inputs(type(toy).forward, (), inputs)


@pytest.mark.parametrize(
    ("then", "expected"),
    [
        ("add_per_sample", {"sample", "condition"}),
        ("add_table", {"sample"}),  # 2 by chance: it fits only as it is
        ("use_first", {"sample"}),  # whatever it carries, all samples are given the first of it
        ("tuple", {"sample", "condition"}),
        ("subtract_mean", None),
        ("use_half", None),
        ("drop_a_sample", None),
    ],
)
def test_toys(then: str, expected: set[str] | None) -> None:
    assert carriers(*toy_call(then)) == expected


@pytest.mark.parametrize("then", ["add_per_sample", "add_table", "use_first", "tuple"])
def test_parts_give_what_the_whole_gives(then: str) -> None:
    toy, inputs = toy_call(then)
    shared = find_shared_batch(dump_skeleton(toy), inputs, 2, CPU)
    assert shared is not None

    def run(of: Inputs) -> tuple[torch.Tensor, ...]:
        output: Any = toy(**of.rebuild())
        return output if isinstance(output, tuple) else (output,)

    parts = [run(part) for part in PartsMemory().parts(inputs, shared)]
    for together, *apart in zip(run(inputs), *parts, strict=True):
        torch.testing.assert_close(torch.cat(apart), together)


def test_parts_of_what_has_not_changed_are_the_same_objects() -> None:
    """By which executors know that they need not be sent again."""
    toy, inputs = toy_call("add_per_sample")
    shared = find_shared_batch(dump_skeleton(toy), inputs, 2, CPU)
    assert shared is not None
    memory = PartsMemory()
    before = [part.tensors() for part in memory.parts(inputs, shared)]
    new = inputs.tensors() | {"sample": torch.randn(2, 3, 4)}
    again = flatten_inputs(type(toy).forward, (), new)
    after = [part.tensors() for part in memory.parts(again, shared)]
    for number in range(2):
        assert after[number]["condition"] is before[number]["condition"]
        assert after[number]["timestep"] is inputs.tensors()["timestep"]
        assert torch.equal(after[number]["sample"][0], new["sample"][number])
    version = before[1]["condition"]._version
    inputs.tensors()["condition"].mul_(2)
    assert after[1]["condition"]._version > version, "a write into the whole is a write into its parts"


def test_failed_guesses_are_not_logged_as_errors(caplog: pytest.LogCaptureFixture) -> None:
    assert carriers(*toy_call("add_table")) == {"sample"}
    assert not caplog.records

"""What holds for every family of pipelines, on a tiny real one of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import asyncdiff
from asyncdiff.pipeline.handle import Handle
from asyncdiff.schedule.ops import Send, SendPrediction
from asyncdiff.tiny import TINY_PIPELINES, TinyCall, TinyPipeline, generate

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

IN_ORDER = 99


@pytest.mark.parametrize("num_stages", [2, pytest.param(3, marks=pytest.mark.wide)])
@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_in_order_is_bitwise_the_untouched_pipeline(name: str, num_stages: int) -> None:
    """Also with another resolution and batch in between; and `remove` leaves nothing behind."""
    family = TINY_PIPELINES[name]
    pipe = family.build()
    calls = (TinyCall(), TinyCall(seed=1, large=True), TinyCall(seed=2, batch=2))
    alone = [generate(family, pipe, call) for call in calls]
    weights = weights_of(family, pipe)
    with asyncdiff.parallelize(pipe, num_stages=num_stages, warmup_steps=IN_ORDER):
        for call, expected in zip(calls, alone, strict=True):
            assert torch.equal(generate(family, pipe, call), expected), call
    assert all(torch.equal(tensor, weights[key]) for key, tensor in weights_of(family, pipe).items())
    assert torch.equal(generate(family, pipe), alone[0])


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_later_steps_use_states_of_earlier_ones(name: str) -> None:
    """Every call is placed in its run: the picture differs from the one in order, and is the same again."""
    family = TINY_PIPELINES[name]
    pipe = family.build()
    call = TinyCall(steps=6)
    alone = generate(family, pipe, call)
    with asyncdiff.parallelize(pipe, num_stages=2, forecast="none"):
        stale = generate(family, pipe, call)
        assert stale.isfinite().all()
        assert not torch.equal(stale, alone)
        assert torch.equal(generate(family, pipe, call), stale)


@pytest.mark.wide
@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_two_processes_are_bitwise_the_local_executor(name: str) -> None:
    """And send what the graph says, hold their own weights only, and give everything back."""
    family = TINY_PIPELINES[name]
    pipe = family.build()
    calls = (TinyCall(steps=6), TinyCall(steps=6, seed=1, large=True), TinyCall(steps=6, seed=2, batch=2))
    alone = generate(family, pipe, calls[0])
    whole_bytes = sum(tensor.nbytes for tensor in weights_of(family, pipe).values())
    with asyncdiff.parallelize(pipe, num_stages=2):
        expected = [generate(family, pipe, call) for call in calls]
    with asyncdiff.parallelize(pipe, devices=["cpu", "cpu"], num_stages=2) as handle:
        for call, latents in zip(calls, expected, strict=True):
            assert torch.equal(generate(family, pipe, call), latents), call
            assert handle.last_run.bytes_sent == expected_bytes(handle) > 0
        held = handle.last_run.weight_bytes
        assert all(0 < bytes_ < whole_bytes for bytes_ in held)
    assert torch.equal(generate(family, pipe, calls[0]), alone)


def weights_of(family: TinyPipeline, pipe: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor.clone()
        for name in family.denoisers
        for key, tensor in getattr(pipe, name).state_dict().items()
    }


def expected_bytes(handle: Handle) -> int:
    """The wiring's figures times the schedules' sends, of the last run, over all denoisers.

    Of rounds that a call has begun: Stable Cascade's loop leaves out the last timestep, and Wan 2.2's first
    transformer those that the second is for.
    """
    installations = handle._division.installations
    _, last_run = max(each.last_call for each in installations if each.last_call is not None)
    total = 0
    for installation in installations:
        stages = installation.executor._rank_stages
        for (run, _), state in installation._channels.items():
            if run != last_run:
                continue
            wiring = state.analysis.wiring
            begun = [round_ for round_ in state.schedule.rounds if round_.first_step in state.arguments]
            for op in (op for round_ in begun for ops in round_.ops for op in ops):
                if isinstance(op, Send):
                    total += wiring.num_bytes(op.value.segment, stages[op.to_rank])
                elif isinstance(op, SendPrediction):
                    total += wiring.prediction_bytes
    return total

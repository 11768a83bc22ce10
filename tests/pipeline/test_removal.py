"""`remove` gives back the pipeline as it was."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from random_pipelines import PIPELINES, denoiser, generate, sd

import asyncdiff
from asyncdiff.errors import ParallelizedError

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")


def attributes(pipe: Any) -> dict[str, list[tuple[str, Any]]]:
    """What is in the three objects' `__dict__`, in order; a noise scheduler's tables change by the run."""
    module = denoiser(pipe)
    return {
        "denoiser": [(name, value) for name, value in vars(module).items() if name != "_parameters"],
        "pipe": list(vars(pipe).items()),
        "scheduler": [(name, None) for name in vars(pipe.scheduler)],
    }


@pytest.mark.parametrize(("name", "devices"), [("sd", None), ("sdxl", None), ("sd3", None), ("sd", 2)])
def test_everything_is_as_it_was(name: str, devices: int | None) -> None:
    pipe = PIPELINES[name]()
    module = denoiser(pipe)
    picture = generate(pipe)
    signature = inspect.signature(module.forward)
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    parameters = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    threads, before = torch.get_num_threads(), attributes(pipe)
    with asyncdiff.parallelize(pipe, devices, num_stages=2) as handle:
        generate(pipe)
        assert inspect.signature(module.forward) == signature
        assert torch.get_num_threads() == threads
    handle.remove()  # twice is once
    assert attributes(pipe) == before
    assert inspect.signature(module.forward) == signature
    assert torch.get_num_threads() == threads
    after = module.state_dict()
    assert list(after) == list(tensors)
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
    assert {name: parameter.requires_grad for name, parameter in module.named_parameters()} == parameters
    assert torch.equal(generate(pipe), picture)


def test_removed_without_a_run() -> None:
    pipe = sd()
    before = attributes(pipe)
    asyncdiff.parallelize(pipe, num_stages=2).remove()
    assert attributes(pipe) == before


def test_every_noise_scheduler_is_let_go() -> None:
    pipe = sd()
    first, second = pipe.scheduler, EulerDiscreteScheduler()
    with asyncdiff.parallelize(pipe, num_stages=2):
        generate(pipe)
        pipe.scheduler = second
        generate(pipe)
    for scheduler in (first, second):
        assert not {"step", "set_timesteps", "__getstate__"} & set(vars(scheduler))


def test_removed_after_an_exception() -> None:
    pipe = sd()
    before = attributes(pipe)
    with pytest.raises(ZeroDivisionError), asyncdiff.parallelize(pipe, num_stages=2):
        generate(pipe, callback_on_step_end=lambda *_: 1 / 0)
    pipe._interrupt, pipe._num_timesteps = False, 6
    assert [name for name, _ in attributes(pipe)["denoiser"]] == [name for name, _ in before["denoiser"]]


def test_a_forward_that_was_put_there_before_comes_back() -> None:
    pipe = sd()
    calls = []
    original = pipe.unet.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    pipe.unet.forward = counting
    asyncdiff.parallelize(pipe, num_stages=2).remove()
    assert pipe.unet.forward is counting
    generate(pipe)
    assert calls


def test_parallelized_again_in_another_way() -> None:
    pipe = sd()
    made = []
    for num_stages in (2, 3, 2):
        with asyncdiff.parallelize(pipe, num_stages=num_stages):
            made.append(generate(pipe, steps=8))
    assert torch.equal(made[0], made[2])
    assert not torch.equal(made[0], made[1])


def test_copying_a_parallelized_denoiser_is_refused() -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, num_stages=2):
        with pytest.raises(ParallelizedError, match=r"cannot be copied.*handle\.remove\(\)"):
            copy.deepcopy(pipe.unet)
    copy.deepcopy(pipe.unet)

"""`compile=True`: every device runs its own blocks compiled, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import asyncdiff
from asyncdiff.pipeline.entry import DenoiserEntry
from asyncdiff.stage.compiled import CompiledForward
from asyncdiff.stage.replica import StageReplica
from asyncdiff.tiny import TINY_PIPELINES, generate

FAMILY = TINY_PIPELINES["sd15"]


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> list[StageReplica]:
    """Those of the handles that are made in the test."""
    made: list[StageReplica] = []
    original = StageReplica.__init__

    def init(self: StageReplica, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(StageReplica, "__init__", init)
    return made


def compiled_paths(replica: StageReplica) -> set[str]:
    """The modules that run compiled, below their stubs."""
    forwards = {path: vars(module).get("forward") for path, module in replica.module.named_modules()}
    return {path for path, f in forwards.items() if isinstance(getattr(f, "previous", f), CompiledForward)}


def test_each_stage_runs_its_own_blocks_compiled(
    replicas: list[StageReplica], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[int] = Counter()

    def fake_compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[id(function)] += 1
            return function(*args, **kwargs)

        return counted

    pipe = FAMILY.build()
    with asyncdiff.parallelize(pipe, num_stages=2):
        expected = generate(FAMILY, pipe)
        assert not any(map(compiled_paths, replicas))
    replicas.clear()
    monkeypatch.setattr(torch, "compile", fake_compile)
    with asyncdiff.parallelize(pipe, num_stages=2, compile=True) as handle:
        assert torch.equal(generate(FAMILY, pipe), expected)
        ours = [compiled_paths(replica) for replica in replicas]
        assert all(ours)
        for paths, blocks in zip(ours, handle.plan.stages, strict=True):
            # Each of its blocks runs in one compiled module, which holds none of another stage.
            assert all(any(contains(path, name_of(block)) for path in paths) for block in blocks)
            others = {block for stage in handle.plan.stages if stage is not blocks for block in stage}
            assert not any(contains(path, name_of(other)) for path in paths for other in others)
            assert len(paths) < len(blocks), "no module larger than a block"
        assert len(calls) == sum(map(len, ours))
        assert min(calls.values()) >= 3, "of the last of four steps, only what predicts"


def contains(path: str, other: str) -> bool:
    return (other + ".").startswith(path + ".")


def name_of(block: str) -> str:
    """The module of a block: a plan counts the calls of one that is called several times."""
    return block.split("#")[0]


def test_what_is_compiled_already_is_left_as_it_is(
    replicas: list[StageReplica], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = FAMILY.build()
    pipe.unet.compile_repeated_blocks(backend="eager", dynamic=False)
    with asyncdiff.parallelize(pipe, num_stages=2):
        generate(FAMILY, pipe)
        by_user = [compiled_paths(replica) for replica in replicas]
    assert any(by_user)
    replicas.clear()
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with asyncdiff.parallelize(pipe, num_stages=2, compile=True):
        generate(FAMILY, pipe)
        for replica, before in zip(replicas, by_user, strict=True):
            assert before <= compiled_paths(replica)
            inside = {
                path for path in compiled_paths(replica) - before for other in before if contains(other, path)
            }
            assert not inside


@pytest.mark.wide
@pytest.mark.timeout(900)
def test_processes_equal_the_local_executor_when_compiled() -> None:
    """The real compiler, in the driver and in the worker; for each kernel it runs a C++ compiler."""
    family = TINY_PIPELINES["pixart-sigma"]
    pipe = family.build()
    with asyncdiff.parallelize(pipe, num_stages=2):
        uncompiled = generate(family, pipe)
    with asyncdiff.parallelize(pipe, num_stages=2, compile=True):
        expected = generate(family, pipe)
    assert torch.allclose(expected, uncompiled, atol=1e-3 * float(uncompiled.abs().max()))
    with asyncdiff.parallelize(pipe, devices=["cpu", "cpu"], num_stages=2, compile=True):
        for _ in range(2):
            assert torch.equal(generate(family, pipe), expected)


@pytest.mark.filterwarnings("ignore:asyncdiff. a denoiser call runs in order")
def test_a_compiled_function_may_call_the_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graph ends before the call, of which nothing is traced."""
    uncompiled: list[Any] = []
    original = DenoiserEntry._call_uncompiled

    def noted(self: DenoiserEntry, *args: Any, **kwargs: Any) -> Any:
        uncompiled.append(torch.compiler.is_compiling())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DenoiserEntry, "_call_uncompiled", torch.compiler.disable(noted))
    pipe = FAMILY.build()
    prompt = torch.randn(2, 7, pipe.unet.config.cross_attention_dim)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor(10), prompt)

    def doubled() -> torch.Tensor:
        return 2 * pipe.unet(*inputs, return_dict=False)[0]

    with asyncdiff.parallelize(pipe, num_stages=2):
        expected = doubled()
        assert not uncompiled
        assert torch.equal(torch.compile(doubled, backend="eager")(), expected)
    assert uncompiled == [False]

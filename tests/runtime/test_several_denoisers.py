"""Two denoisers in the same workers: what one of them does or suffers does not hold up the other."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import is_running
from saboteur import Saboteur, order

import asyncdiff
from asyncdiff.errors import WeightsLostError, WorkerError
from asyncdiff.tiny import TINY_PIPELINES, TinyCall, generate

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

WAN, CASCADE = TINY_PIPELINES["wan-2.2"], TINY_PIPELINES["stable-cascade"]
CALL = TinyCall(steps=8)
LAST_STEP_OF_FIRST = 3  # of eight
STAGES = [["patch_embedding", "blocks.0"], ["blocks.1"], ["blocks.2", "proj_out"]]
THREE: dict[str, Any] = {"devices": ["cpu"] * 3, "partition": STAGES}
ERROR_WITHIN_S = 15.0


@pytest.mark.usefixtures("spawned")
@pytest.mark.parametrize("when", ["first run", "later run"])
def test_failure_in_what_is_left_of_the_first_denoisers_last_round(tmp_path: Path, when: str) -> None:
    """The middle stage computes for a step that never comes: the second denoiser must not wait for it."""
    pipe = WAN.build()
    orders = tmp_path / "orders"
    pipe.transformer.blocks[1] = Saboteur(pipe.transformer.blocks[1], orders)
    with asyncdiff.parallelize(pipe, num_stages=3, partition=STAGES):
        expected = generate(WAN, pipe, CALL)
    with asyncdiff.parallelize(pipe, **THREE) as handle:
        if when == "later run":  # the second denoiser is installed then, in the first run it has yet to be
            assert torch.equal(generate(WAN, pipe, CALL), expected)

        def late(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if index == LAST_STEP_OF_FIRST - 1:
                _ = handle.last_run  # answered when all that was asked of the workers is done
                order(orders, "fail late")
            return kwargs

        assert torch.equal(generate(WAN, pipe, CALL, callback_on_step_end=late), expected)
        assert not orders.exists()
        assert torch.equal(generate(WAN, pipe, CALL), expected)


@pytest.mark.parametrize("denoiser", [0, 1], ids=WAN.denoisers)
def test_killed_worker_is_named_and_what_it_held_of_both(denoiser: int) -> None:
    pipe = WAN.build()
    handle = asyncdiff.parallelize(pipe, **THREE)
    generate(WAN, pipe, CALL)
    pid = handle.workers[0].pid

    def callback(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == LAST_STEP_OF_FIRST + 3 * denoiser - 1:
            os.kill(pid, signal.SIGKILL)
        return kwargs

    start = time.monotonic()
    with pytest.raises(WorkerError, match=f"rank 1 .process {pid} .* ended unexpectedly at step"):
        generate(WAN, pipe, CALL, callback_on_step_end=callback)
    assert time.monotonic() - start < ERROR_WITHIN_S
    with pytest.raises(WeightsLostError, match=r"of transformer were held .* of transformer_2 were held"):
        handle.remove()
    assert not any(is_running(worker.pid) for worker in handle.workers)
    pipe = WAN.build()
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=99):
        generate(WAN, pipe, CALL)


@pytest.mark.usefixtures("spawned")
def test_two_threads_with_a_denoiser_each() -> None:
    """They take turns, and neither sees the other's states."""
    pipe = CASCADE.build()
    # A tokenizer of transformers is not for two threads: each call sets its padding for that call.
    pipe.decoder_pipe.register_modules(tokenizer=copy.deepcopy(pipe.decoder_pipe.tokenizer))
    calls = {
        "prior": (pipe.prior_pipe, TINY_PIPELINES["stable-cascade-prior"]),
        "decoder": (pipe.decoder_pipe, TINY_PIPELINES["stable-cascade-decoder"]),
    }
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 3):
        expected = {name: generate(family, inner, CALL) for name, (inner, family) in calls.items()}
        results: dict[str, list[torch.Tensor]] = {name: [] for name in calls}

        def run(name: str) -> None:
            inner, family = calls[name]
            results[name] += [generate(family, inner, CALL) for _ in range(3)]

        threads = [threading.Thread(target=run, args=(name,)) for name in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    for name in calls:
        assert len(results[name]) == 3
        assert all(torch.equal(result, expected[name]) for result in results[name])

"""How fast a way is: measured on devices that are there, simulated for those that are not."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from asyncdiff.bench.quality.results import Speed
from asyncdiff.pipeline import Plan, plan
from asyncdiff.planner import simulate
from asyncdiff.planner.predictions import Predictions
from asyncdiff.simulation import Machine

LINK = "pcie4"
"""The links between simulated devices; `asyncdiff plan` compares others."""

_RUNS = 3


class SimulatedSpeeds:
    """Of plans for one pipeline and one batch (`call`): its blocks are timed once for each partition, on the
    device that it is on. The pipeline must not be divided when that is done."""

    def __init__(self, pipe: Any, call: Mapping[str, Any], num_steps: int) -> None:
        self._pipe = pipe
        self._call = call
        self._num_steps = num_steps
        self._measured: dict[tuple[Any, ...], Predictions] = {}

    def speed(self, of: Plan, steps_in_order: Sequence[int]) -> Speed:
        """`steps_in_order`: how many of them each batch had; the mean over the batches is taken."""
        predictions = _with_leads(self._predictions(of, of.guidance_refresh), of)
        whole = self._predictions(of, 1)
        machine = Machine.preset(LINK, of.num_workers)
        # Where the steps lie that run in order makes no difference to how long they take.
        seconds = [
            simulate(
                replace(of, predictions=predictions, warmup_steps=count), machine, num_steps=self._num_steps
            ).total_s
            for count in steps_in_order
        ]
        step_in_order_s = whole.step_in_order_seconds(of.stride)
        return Speed(statistics.fmean(seconds), self._num_steps * step_in_order_s, "simulated")

    def _predictions(self, of: Plan, guidance_refresh: int) -> Predictions:
        """With refresh, those of half a batch."""
        key = (of.kind, of.stages, of.stride, guidance_refresh > 1)
        if key not in self._measured:
            timed = plan(
                self._pipe,
                num_stages=of.num_stages,
                stride=of.stride,
                freshness="paper",  # what is read fresh is settled
                guidance="together",
                guidance_refresh=guidance_refresh,
                partition=of.stages,
                profile=True,
                example=self._call,
            )
            assert timed.predictions is not None
            self._measured[key] = timed.predictions
        return self._measured[key]


def _with_leads(measured: Predictions, of: Plan) -> Predictions:
    """With what the plan reads fresh, and when it is wanted: as estimated, in measured seconds."""
    assert of.predictions is not None
    scale = sum(measured.segment_seconds) / sum(of.predictions.segment_seconds)
    fresh = of.predictions.fresh_leads
    return replace(
        measured, fresh_leads=tuple((producer, reader, scale * lead_s) for producer, reader, lead_s in fresh)
    )


def denoise_seconds(pipe: Any, call: Mapping[str, Any], device: torch.device) -> float:
    """Median seconds of a call without decoding; everything has run before."""
    undecoded = (
        {"output_type": "latent"} if "output_type" in inspect.signature(pipe.__call__).parameters else {}
    )
    return statistics.median(_seconds(pipe, {**call, **undecoded}, device) for _ in range(_RUNS))


def _seconds(pipe: Any, call: Mapping[str, Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    pipe(**call)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

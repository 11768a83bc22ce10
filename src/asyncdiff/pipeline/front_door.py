"""The front door: one line in a diffusers script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from asyncdiff.config import Settings
from asyncdiff.errors import ConfigurationError
from asyncdiff.launch.spawn import SpawnedWorkers
from asyncdiff.launch.torchrun import join_torchrun
from asyncdiff.pipeline.analysis import first_plan, record_call
from asyncdiff.pipeline.denoiser import (
    capture_call,
    denoiser_of,
    device_of,
    refuse_compiled,
    refuse_offloading,
    replaced_forward,
)
from asyncdiff.pipeline.devices import Placement, settle_placement
from asyncdiff.pipeline.handle import Handle, WorkerInfo
from asyncdiff.pipeline.installation import DenoiserEntry, Installation
from asyncdiff.pipeline.partition_request import PartitionRequest, check_partition
from asyncdiff.planner import Plan
from asyncdiff.profile import time_calls
from asyncdiff.runtime.local import LocalExecutor
from asyncdiff.runtime.remote import RemoteExecutor, Workers
from asyncdiff.trace import call_costs, flatten_inputs
from asyncdiff.weights import dump_skeleton


def parallelize(
    pipe: Any,
    devices: int | Sequence[str] | None = None,
    *,
    num_stages: int | None = None,
    stride: int = 1,
    warmup_steps: int = 1,
    time_shift: bool = False,
    forecast: str = "linear",
    partition: PartitionRequest = None,
    plan: Plan | None = None,
    runtime: str = "auto",
) -> Handle:
    """Divide the pipeline's denoiser over devices; `pipe(...)` is called as before.

    `devices`: a number, or names, the first being the one the pipeline is on; `num_stages + stride - 1` of
    them. Without devices but with `num_stages`, all stages run in this process (runtime "local"): the image
    that as many devices would give. Under torchrun every rank calls this; ranks above 0 become workers and
    leave by `SystemExit(0)` when rank 0 ends. `stride`, `warmup_steps`, `time_shift`: Chen et al. 2024,
    sections 3.2-3.3; `forecast`: "linear" (docs/method.md, section 5) or "none", as in the paper.
    `partition`: "chain", "nested", module names per stage, or None to choose the kind by speed, weights per
    device and traffic. `plan`: a saved or edited plan, which then settles all of this but the runtime. Raises
    `ConfigurationError` before anything is started.
    """
    denoiser = denoiser_of(pipe)
    _refuse_parallelized(denoiser)
    refuse_compiled(denoiser)
    refuse_offloading(pipe, denoiser)
    device = device_of(denoiser)
    if not isinstance(plan, Plan | None):
        raise ConfigurationError(
            f"plan must be a Plan (a file is read by Plan.load), but {plan!r} was given."
        )
    if plan is not None:
        devices, num_stages = _devices_of(plan, devices, num_stages), plan.num_stages
        settings = plan.settings
        placement = settle_placement(devices, num_stages, settings.stride, runtime, device)
        check_partition(plan.stages, settings, denoiser)
    else:
        placement = settle_placement(devices, num_stages, stride, runtime, device)
        settings = Settings(placement.num_stages, stride, warmup_steps, time_shift, forecast)
        check_partition(partition, settings, denoiser)
    threads = plan.threads_per_device if plan is not None else placement.threads_per_device
    executor, workers, names = _start(placement, threads, type(denoiser).__module__)
    installation = Installation(
        pipe,
        denoiser,
        executor,
        settings,
        names,
        partition=partition,
        plan=plan,
        threads=threads,
        ships=placement.runtime != "local",
    )
    installation.install()
    return Handle(installation, workers)


def plan(
    pipe: Any,
    devices: int | Sequence[str] | None = None,
    *,
    num_stages: int | None = None,
    stride: int = 1,
    warmup_steps: int = 1,
    time_shift: bool = False,
    forecast: str = "linear",
    partition: PartitionRequest = None,
    profile: bool = False,
    example: Mapping[str, Any] | None = None,
) -> Plan:
    """How `parallelize` with the same arguments would divide the denoiser; nothing is started or moved.

    `example`: keyword arguments of a pipeline call, which is made up to its first denoiser call to see the
    inputs (default: an empty prompt). `profile`: time every block on the denoiser's device with those inputs,
    instead of estimating from FLOPs and bytes; slower, better balanced, and not the same cut every time.
    """
    denoiser = denoiser_of(pipe)
    _refuse_parallelized(denoiser)
    refuse_compiled(denoiser)
    refuse_offloading(pipe, denoiser)
    device = device_of(denoiser)
    placement = settle_placement(devices, num_stages, stride, "auto", device)
    settings = Settings(placement.num_stages, stride, warmup_steps, time_shift, forecast)
    check_partition(partition, settings, denoiser)
    call = dict(example) if example is not None else {"prompt": ""}
    args, kwargs = capture_call(pipe, denoiser, call)
    inputs = flatten_inputs(type(denoiser).forward, args, kwargs)
    skeleton = dump_skeleton(denoiser, allow_main=True)
    recording = record_call(denoiser, skeleton, inputs, device, weights_at_hand=True)
    seconds = None
    if profile:
        with replaced_forward(denoiser, None):
            seconds = time_calls(
                denoiser, inputs, call_costs(recording), device, threads=placement.threads_per_device
            )
    return first_plan(
        recording,
        settings,
        placement.devices,
        partition,
        weights=skeleton,
        dtype=next(denoiser.parameters()).dtype,
        threads_per_device=placement.threads_per_device,
        seconds=seconds,
    )


def _refuse_parallelized(denoiser: nn.Module) -> None:
    if isinstance(vars(denoiser).get("forward"), DenoiserEntry):
        raise ConfigurationError(
            "This pipeline's denoiser is already parallelized; pipelines that share it are served too. Call "
            "handle.remove() first to divide it in another way."
        )


def _devices_of(
    plan: Plan, devices: int | Sequence[str] | None, num_stages: int | None
) -> int | Sequence[str] | None:
    """The plan's own devices unless others are given; one of them runs all stages in turn."""
    if num_stages not in (None, plan.num_stages):
        raise ConfigurationError(
            f"num_stages={num_stages} was given with a plan of {plan.num_stages} stages."
        )
    if devices is not None:
        return devices
    return plan.devices if len(plan.devices) == plan.num_workers else None


def _start(
    placement: Placement, threads: int | None, denoiser_module: str
) -> tuple[LocalExecutor | RemoteExecutor, tuple[WorkerInfo, ...], tuple[str, ...]]:
    """The executor, its workers, and the device of every rank."""
    if placement.runtime == "local":
        return LocalExecutor(torch.device(placement.devices[0])), (), placement.devices
    host = "127.0.0.1"
    workers: Workers
    devices = list(placement.devices)
    if placement.runtime == "torchrun":
        workers = join_torchrun(devices)
        devices = [devices[0], *(workers.connections[rank].device for rank in range(1, len(devices)))]
        host = workers.host
    else:
        workers = SpawnedWorkers([threads] * (len(devices) - 1))
    counts: list[int | None] = [threads if torch.device(name).type == "cpu" else None for name in devices]
    try:
        executor = RemoteExecutor(workers, devices, counts, host=host, preload=(denoiser_module,))
    except BaseException:
        workers.close()
        raise
    infos = tuple(
        WorkerInfo(rank, devices[rank], connection.pid, connection.host)
        for rank, connection in sorted(workers.connections.items())
    )
    return executor, infos, tuple(devices)

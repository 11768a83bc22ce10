"""The front door: one line in a diffusers script."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from asyncdiff.config import Settings, check_guidance, settle_warmup
from asyncdiff.errors import ConfigurationError, ParallelizedError
from asyncdiff.guidance import PartsMemory, batch_size, find_shared_batch
from asyncdiff.launch.default_group import torchrun_rank
from asyncdiff.launch.spawn import SpawnedWorkers
from asyncdiff.launch.torchrun import join_torchrun
from asyncdiff.pipeline.analysis import first_plan, record_call
from asyncdiff.pipeline.controlnet import NAME as CONTROLNET_NAME
from asyncdiff.pipeline.controlnet import ControlNetInstallation, controlnet_of
from asyncdiff.pipeline.controlnet_cost import examine_controlnet, returning
from asyncdiff.pipeline.denoiser import (
    capture_call,
    denoisers_of,
    device_of,
    refuse_compiled,
    refuse_int8,
    refuse_offloading,
    replaced_forward,
)
from asyncdiff.pipeline.devices import Placement, have_room, settle_placement
from asyncdiff.pipeline.division import Division
from asyncdiff.pipeline.entry import DenoiserEntry
from asyncdiff.pipeline.forward import current_forward
from asyncdiff.pipeline.guards import refuse_other_ways
from asyncdiff.pipeline.handle import Handle, WorkerInfo
from asyncdiff.pipeline.installation import Installation, TwoGroups
from asyncdiff.pipeline.partition_request import PartitionRequest, check_partition
from asyncdiff.pipeline.profiling import profile_pipeline
from asyncdiff.pipeline.scheduler_lookup import is_guided
from asyncdiff.planner import Plan, check_speeds, share_used_by_groups
from asyncdiff.profile import relative_speeds
from asyncdiff.runtime.groups import Groups
from asyncdiff.runtime.local import LocalExecutor
from asyncdiff.runtime.remote import RemoteExecutor, Workers
from asyncdiff.stage import BlockExecution
from asyncdiff.trace import flatten_inputs
from asyncdiff.weights import Unloaded, dump_skeleton, free_tensors, named_tensors, read_unloaded

_LEAST_SHARE_OF_GROUPS = 0.9  # of the speed of unequal devices; below, stages use more


def parallelize(
    pipe: Any,
    devices: int | Sequence[str] | None = None,
    *,
    num_stages: int | None = None,
    stride: int = 1,
    warmup_steps: int | str = 1,
    tolerance: float | None = None,
    time_shift: bool = False,
    forecast: str = "latents",
    freshness: str = "auto",
    guidance: str = "auto",
    guidance_refresh: int = 1,
    controlnet: str = "serial",
    partition: PartitionRequest = None,
    plan: Plan | Mapping[str, Plan] | None = None,
    runtime: str = "auto",
    compile: bool = False,
    cuda_graphs: bool = False,
) -> Handle:
    """Divide the pipeline's denoiser, or each of several, over devices; `pipe(...)` is called as before.

    `devices`: a number, or names, the first being the one the pipeline is on; `num_stages + stride - 1`
    of them, twice that with `guidance="split"` (three times for three-way guidance), which gives the
    halves of a batched denoiser call, or the two calls of a step, to two groups of devices. "together"
    divides all devices into stages; "auto" splits where the devices are an even number, neither
    `num_stages` nor a partition was asked for, and the first call is guided with a batch that can be
    shared (docs/guidance.md). `guidance_refresh=k`: after warm-up both halves of guidance are evaluated
    at every k-th step only, and in between one is continued (same page). Without devices but with
    `num_stages`, all stages run in this process (runtime "local"): the image that as many devices would
    give. Under torchrun every rank calls this; ranks above 0 become workers and leave by `SystemExit(0)`
    when rank 0 ends. `stride`, `warmup_steps`, `time_shift`: Chen et al. 2024, sections 3.2-3.3;
    `forecast`: "latents", "linear" or "damped" (docs/method.md, section 5), or "none", as in the paper.
    `freshness`: "auto", so that a stage reads what arrives in time at the step it was produced in
    (section 6), or "paper": one step late. `warmup_steps="auto"`: at least one step runs in order, and
    then every one while the relative error of the forecast is above `tolerance` (0.3);
    `last_run.steps_in_order` tells which. `partition`: "chain", "nested", module names per stage, or
    None to choose the kind by speed, weights per device and traffic. `plan`: a saved or edited plan,
    which then settles all of this but the runtime; for several denoisers of different architectures one
    for each by name, as `handle.plans`. `compile`: every device compiles its own blocks
    (`torch.compile`), unless they are compiled already. `cuda_graphs`: every device captures its own
    blocks at their third call and replays them from then on, on CUDA devices. `controlnet`:
    "serial", in this process before the denoiser; "overlap" gives the last device to the pipeline's
    ControlNets, which compute while that part of the denoiser does which reads nothing of what they return,
    exactly; "ahead" has them compute every step after warm-up before its call, on latents continued
    (docs/controlnet.md).
    Raises `ConfigurationError` before anything is started.
    """
    denoisers = denoisers_of(pipe)
    _refuse_what_cannot_be_divided(pipe, denoisers)
    wish = Wish(
        num_stages,
        stride,
        warmup_steps,
        tolerance,
        time_shift,
        forecast,
        freshness,
        guidance,
        guidance_refresh,
        controlnet,
        partition,
        plan,
        runtime,
        compile,
        cuda_graphs,
    )
    return divide(pipe, denoisers, device_of(denoisers.values()), devices, wish)


@dataclass(frozen=True)
class Wish:
    """What a caller of `parallelize` asks for besides devices."""

    num_stages: int | None = None
    stride: int = 1
    warmup_steps: int | str = 1
    tolerance: float | None = None
    time_shift: bool = False
    forecast: str = "latents"
    freshness: str = "auto"
    guidance: str = "auto"
    guidance_refresh: int = 1
    controlnet: str = "serial"
    partition: PartitionRequest = None
    plan: Plan | Mapping[str, Plan] | None = None
    runtime: str = "auto"
    compile: bool = False
    cuda_graphs: bool = False

    @property
    def guidance_of_devices(self) -> str:
        """As `settle_placement` takes it: a partition that was asked for is one of all devices, and a half
        that is left out at times needs none of its own."""
        is_settled = self.partition is not None or self.guidance_refresh != 1
        return "together" if self.guidance == "auto" and is_settled else self.guidance


def divide(
    pipe: Any,
    denoisers: Mapping[str, nn.Module],
    device: torch.device,
    devices: int | Sequence[str] | None,
    wish: Wish,
    unloaded: Mapping[str, Unloaded] | None = None,
) -> Handle:
    """As `parallelize`; the denoisers are on `device`, or their weights (`unloaded`) still in files."""
    plans = _plans_by_name(wish.plan, denoisers)
    partitions: dict[str, PartitionRequest]
    if plans:
        given = next(iter(plans.values()))
        settings = given.settings
        placement = settle_placement(
            _devices_of(given, devices, wish.num_stages),
            given.num_stages,
            settings.stride,
            wish.runtime,
            device,
            "split" if given.groups > 1 else "together",
            wish.controlnet,
        )
        placement = _placement_of(given, placement, wish.guidance)
        partitions = {name: each.stages for name, each in plans.items()}
    else:
        placement = settle_placement(
            devices,
            wish.num_stages,
            wish.stride,
            wish.runtime,
            device,
            wish.guidance_of_devices,
            wish.controlnet,
        )
        settings = _settings(placement, wish)
        partitions = dict.fromkeys(denoisers, wish.partition)
    for name, denoiser in denoisers.items():
        check_partition(partitions[name], settings, denoiser)
    execution = _execution(placement, wish)
    controlnet = None
    if wish.controlnet != "serial":
        controlnet = controlnet_of(pipe, tuple(denoisers.values()))
        _refuse_what_cannot_be_divided(pipe, {CONTROLNET_NAME: controlnet})
    threads = given.threads_per_device if plans else placement.threads_per_device
    if placement.runtime == "torchrun" and torchrun_rank() > 0:
        _let_go_of_weights(pipe)
    started = _start(placement, threads, denoisers, unloaded or {}, execution)
    with ExitStack() as undo:
        undo.callback(started.close_workers)
        installations = []
        for name, denoiser in denoisers.items():
            groups = started.open_groups(name, settings.groups)
            undo.callback(groups.close)
            two_groups = None
            if placement.split_stages is not None:
                open_two = functools.partial(started.open_groups, name, 2)
                two_groups = TwoGroups(placement.split_stages, open_two)
            installations.append(
                Installation(
                    pipe,
                    name,
                    denoiser,
                    groups,
                    settings,
                    started.devices[: len(placement.devices)],
                    started.lock,
                    partition=wish.partition,
                    plan=plans.get(name),
                    threads=threads,
                    ships=placement.runtime != "local",
                    two_groups=two_groups,
                )
            )
        beside = None
        if controlnet is not None:
            groups = started.open_controlnet(controlnet)
            undo.callback(groups.close)
            beside = ControlNetInstallation(
                pipe,
                CONTROLNET_NAME,
                controlnet,
                groups,
                Settings(1, warmup_steps=settings.warmup_steps, forecast="linear"),
                started.devices[:1],
                started.lock,
                partition=None,
                plan=None,
                threads=threads,
                ships=placement.runtime != "local",
                works_ahead=wish.controlnet == "ahead",
            )
        undo.pop_all()
    division = Division(pipe, installations, started.devices, started.lock, started.close_workers, beside)
    division.install()
    handle = Handle(division, started.workers)
    for denoiser in denoisers.values():
        entry = current_forward(denoiser)
        assert isinstance(entry, DenoiserEntry)
        entry.handle = handle
    return handle


def _execution(placement: Placement, wish: Wish) -> BlockExecution:
    others = [name for name in placement.all_devices if torch.device(name).type != "cuda"]
    if wish.cuda_graphs and others:
        raise ConfigurationError(
            f"cuda_graphs=True: {others[0]!r} is not a CUDA device. Leave it out, or use CUDA devices only."
        )
    return BlockExecution(wish.compile, wish.cuda_graphs)


def _settings(placement: Placement, wish: Wish) -> Settings:
    warmup_steps, tolerance = settle_warmup(wish.warmup_steps, wish.tolerance)
    return Settings(
        placement.num_stages,
        wish.stride,
        warmup_steps,
        wish.time_shift,
        wish.forecast,
        wish.freshness,
        tolerance,
        placement.groups,
        wish.guidance_refresh,
    )


def _placement_of(plan: Plan, placement: Placement, guidance: str) -> Placement:
    """The placement with the plan's groups; `ConfigurationError` where the devices or `guidance` ask for
    others."""
    check_guidance(guidance)
    is_split = plan.groups > 1
    if guidance != "auto" and (guidance == "split") != is_split:
        raise ConfigurationError(
            f'guidance="{guidance}" was given with a plan of {plan.groups} group{"s" * is_split} of devices.'
        )
    if placement.runtime != "local" and placement.groups != plan.groups:
        raise ConfigurationError(
            f"The plan needs {plan.num_workers} devices ({plan.groups} groups), but {len(placement.devices)} "
            "were given."
        )
    return replace(placement, groups=plan.groups)


def handle_of(pipe: Any) -> Handle:
    """The handle of a pipeline that is divided over devices, or shares its denoiser with one that is;
    `ParallelizedError` for any other."""
    for denoiser in denoisers_of(pipe).values():
        entry = current_forward(denoiser)
        if isinstance(entry, DenoiserEntry) and entry.handle is not None:
            return entry.handle
    raise ParallelizedError(f"This {type(pipe).__name__} is not divided over devices.")


def plan(
    pipe: Any,
    devices: int | Sequence[str] | None = None,
    *,
    num_stages: int | None = None,
    stride: int = 1,
    warmup_steps: int | str = 1,
    tolerance: float | None = None,
    time_shift: bool = False,
    forecast: str = "latents",
    freshness: str = "auto",
    guidance: str = "auto",
    guidance_refresh: int = 1,
    controlnet: str = "serial",
    partition: PartitionRequest = None,
    profile: bool = False,
    speeds: Sequence[float] | None = None,
    example: Mapping[str, Any] | None = None,
) -> Plan:
    """How `parallelize` with the same arguments would divide the denoiser (each of several, if they have the
    same architecture); nothing is started or moved.

    `example`: keyword arguments of a pipeline call, which is made up to its first denoiser call to see
    the inputs (default: an empty prompt). `profile`: time every block on the denoiser's device with those
    inputs, and the pipeline's own work between denoiser calls, instead of estimating from FLOPs and
    bytes; slower, better balanced, and not the same cut every time. `speeds`: of each device, as many as
    there are, 1.0 for one like the denoiser's; by default all are equal, or with `profile` as fast as
    devices of another kind turn out to be, each of which holds the whole denoiser while it is timed.
    `controlnet`: with "overlap" and "ahead" the last device is none of the plan's, and a ControlNet no part
    of the pipeline's own work.
    """
    denoisers = denoisers_of(pipe)
    _refuse_what_cannot_be_divided(pipe, denoisers)
    _refuse_different_ones(pipe, denoisers)
    denoiser = next(iter(denoisers.values()))
    device = device_of(denoisers.values())
    wish = Wish(
        num_stages,
        stride,
        warmup_steps,
        tolerance,
        time_shift,
        forecast,
        freshness,
        guidance,
        guidance_refresh,
        controlnet,
        partition,
    )
    placement = settle_placement(
        devices, num_stages, stride, "auto", device, wish.guidance_of_devices, controlnet
    )
    settings = _settings(placement, wish)
    check_partition(partition, settings, denoiser)
    check_speeds(settings.num_stages, stride, speeds, settings.groups)
    call = dict(example) if example is not None else {"prompt": ""}
    beside = None
    if controlnet != "serial":
        beside = examine_controlnet(pipe, call, weights_at_hand=True)
    args, kwargs = capture_call(pipe, denoisers.values(), call)
    inputs = flatten_inputs(type(denoiser).forward, args, kwargs)
    skeleton = dump_skeleton(denoiser, allow_main=True)
    threads = placement.threads_per_device
    if profile and speeds is None and len(placement.devices) > 1:
        with replaced_forward(denoiser, None):
            speeds = relative_speeds(denoiser, skeleton, inputs, placement.devices, threads)
    shared = None
    if placement.split_stages is not None and is_guided(pipe) is not False and _are_alike(speeds):
        if have_room(placement.devices, skeleton.num_bytes / placement.split_stages):
            shared = find_shared_batch(skeleton, inputs, 2, device)
        if shared is not None:
            settings = replace(settings, num_stages=placement.split_stages, groups=2)
    elif settings.guidance_refresh > 1 and is_guided(pipe) is not False:
        shared = find_shared_batch(skeleton, inputs, 2, device)
    elif settings.groups > 1:
        ways = (find_shared_batch(skeleton, inputs, parts, device) for parts in range(settings.groups, 1, -1))
        shared = next((way for way in ways if way is not None), None)
        if shared is None and is_guided(pipe) is False:
            raise ConfigurationError(
                f"The example call has a batch of {batch_size(inputs)}, which cannot be shared between "
                f"{settings.groups} groups of devices, and no guidance. Use "
                'guidance="together", or another example.'
            )
    whole = inputs
    if shared is not None:  # else guidance may be several calls of a step, which take turns
        inputs = PartsMemory().parts(inputs, shared)[0]
    recording = record_call(denoiser, skeleton, inputs, device, weights_at_hand=True)
    measured = None
    if profile:
        with ExitStack() as stack:
            if beside is not None:
                stack.enter_context(replaced_forward(beside.module, returning(beside.output, beside.inputs)))
            measured = profile_pipeline(
                pipe, denoisers.values(), call, inputs, recording, device, threads, whole=whole
            )
    return first_plan(
        recording,
        settings,
        placement.devices,
        partition,
        weights=skeleton,
        dtype=next(denoiser.parameters()).dtype,
        threads_per_device=threads,
        seconds=measured.block_seconds if measured else None,
        driver_seconds=measured.driver_seconds if measured else None,
        speeds=speeds,
    )


def _are_alike(speeds: Sequence[float] | None) -> bool:
    """Whether two groups of these devices, which get the same work, leave little of their speed unused."""
    return speeds is None or share_used_by_groups(speeds, 2) >= _LEAST_SHARE_OF_GROUPS


def _refuse_what_cannot_be_divided(pipe: Any, denoisers: Mapping[str, nn.Module]) -> None:
    for denoiser in denoisers.values():
        if isinstance(current_forward(denoiser), DenoiserEntry):
            raise ConfigurationError(
                "This pipeline's denoiser is already parallelized; pipelines that share it are served too. "
                "Call handle.remove() first to divide it in another way."
            )
        refuse_compiled(denoiser)
        refuse_int8(denoiser)
        refuse_offloading(pipe, denoiser)
        refuse_other_ways(denoiser)


def _refuse_different_ones(pipe: Any, denoisers: Mapping[str, nn.Module]) -> None:
    kinds = {
        (type(denoiser), tuple((name, tensor.shape) for name, tensor in denoiser.named_parameters()))
        for denoiser in denoisers.values()
    }
    if len(kinds) > 1:
        raise ConfigurationError(
            f"asyncdiff.plan makes one plan, but {type(pipe).__name__} has denoisers of different "
            f"architectures: {', '.join(denoisers)}. Plan each with a pipeline of its own (pipe.prior_pipe, "
            "pipe.decoder_pipe), or call parallelize, run the pipeline once and read handle.plans."
        )


def _plans_by_name(
    plan: Plan | Mapping[str, Plan] | None, denoisers: Mapping[str, nn.Module]
) -> dict[str, Plan]:
    """The plan of each denoiser; none where none was given."""
    if plan is None:
        return {}
    plans = dict(plan) if isinstance(plan, Mapping) else dict.fromkeys(denoisers, plan)
    wrong = next((each for each in plans.values() if not isinstance(each, Plan)), None)
    if wrong is not None:
        raise ConfigurationError(
            f"plan must be a Plan (a file is read by Plan.load), but {wrong!r} was given."
        )
    if plans.keys() != denoisers.keys():
        raise ConfigurationError(
            f"The plans are for {', '.join(plans) or 'nothing'}, but the pipeline's denoisers are "
            f"{', '.join(denoisers)}. Give one for each."
        )
    if len({(each.settings, each.devices, each.threads_per_device) for each in plans.values()}) > 1:
        raise ConfigurationError(
            f"The plans of {', '.join(plans)} differ in devices, threads_per_device, number of stages or "
            "settings, which the denoisers of one pipeline share. Make them equal."
        )
    return plans


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


def _let_go_of_weights(pipe: Any) -> None:
    """A rank that becomes a worker never comes back to its own copy of the pipeline, which would otherwise
    stay in memory beside its stage until the driver ends."""
    for part in vars(pipe).values():
        if isinstance(part, nn.Module):
            free_tensors(part, {name for name, _ in named_tensors(part)})


@dataclass(frozen=True)
class _Started:
    """`open_groups`: so many groups for the denoiser of a name, all with the same workers; `open_controlnet`:
    one, with the ControlNet's; `devices`: of every rank; `lock`: see `Installation`."""

    open_groups: Callable[[str, int], Groups]
    open_controlnet: Callable[[nn.Module], Groups]
    devices: tuple[str, ...]
    lock: threading.RLock
    workers: tuple[WorkerInfo, ...] = ()
    close_workers: Callable[[], None] = lambda: None


def _start(
    placement: Placement,
    threads: int | None,
    denoisers: Mapping[str, nn.Module],
    unloaded: Mapping[str, Unloaded],
    execution: BlockExecution,
) -> _Started:
    if placement.runtime == "local":
        device = torch.device(placement.devices[0])
        for name, weights in unloaded.items():
            read_unloaded(denoisers[name], weights, device)

        def open_local(name: str, count: int) -> Groups:
            return Groups([LocalExecutor(device, execution=execution) for _ in range(count)])

        def open_local_controlnet(controlnet: nn.Module) -> Groups:
            executor = LocalExecutor(device, execution=execution)
            return Groups([executor], driver_computes=False)

        return _Started(open_local, open_local_controlnet, placement.devices, threading.RLock())
    host = "127.0.0.1"
    workers: Workers
    devices = list(placement.all_devices)
    if placement.runtime == "torchrun":
        workers = join_torchrun(devices)
        devices = [devices[0], *(workers.connections[rank].device for rank in range(1, len(devices)))]
        host = workers.host
    else:
        workers = SpawnedWorkers([threads] * (len(devices) - 1))
    counts: list[int | None] = [threads if torch.device(name).type == "cpu" else None for name in devices]

    def open_one(module: nn.Module, members: tuple[int, ...], unloaded: Unloaded | None) -> RemoteExecutor:
        return RemoteExecutor(
            workers,
            [devices[rank] for rank in (0, *members)],
            [counts[rank] for rank in (0, *members)],
            members=members,
            host=host,
            preload=(type(module).__module__,),
            unloaded=unloaded,
            execution=execution,
        )

    def open_groups(name: str, count: int) -> Groups:
        executors: list[RemoteExecutor] = []
        try:
            for members in _members(len(placement.devices), count):
                executors.append(open_one(denoisers[name], members, unloaded.get(name)))
        except BaseException:
            for executor in executors:
                executor.close()
            raise
        return Groups(executors)

    def open_controlnet(controlnet: nn.Module) -> Groups:
        return Groups([open_one(controlnet, (len(devices) - 1,), None)], driver_computes=False)

    infos = tuple(
        WorkerInfo(rank, devices[rank], connection.pid, connection.host)
        for rank, connection in sorted(workers.connections.items())
    )
    return _Started(open_groups, open_controlnet, tuple(devices), workers.users.lock, infos, workers.close)


def _members(num_devices: int, groups: int) -> list[tuple[int, ...]]:
    """The workers' ranks of each group; rank 0 is the driver."""
    size = num_devices // groups
    everyone = range(num_devices)
    return [tuple(rank for rank in everyone[i * size : (i + 1) * size] if rank) for i in range(groups)]

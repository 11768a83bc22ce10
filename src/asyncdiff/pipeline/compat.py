"""The class of the published code (github.com/czg1225/AsyncDiff), so that scripts written for it run
unchanged.

What differs underneath: the pipeline runs in rank 0 alone. The other ranks become stage workers inside the
constructor and leave it by `SystemExit(0)` when rank 0 ends, so what such a script does after it happens
once.
"""

from __future__ import annotations

from typing import Any

import torch

from asyncdiff.config import Settings
from asyncdiff.errors import ConfigurationError
from asyncdiff.launch.default_group import (
    ensure_default_group,
    is_started_by_torchrun,
    torchrun_local_rank,
    torchrun_rank,
    torchrun_world_size,
)
from asyncdiff.pipeline.denoiser import denoisers_of
from asyncdiff.pipeline.front_door import parallelize
from asyncdiff.pipeline.handle import Handle
from asyncdiff.pipeline.user_warning import warn_user


class AsyncDiff:
    """`asyncdiff.parallelize` under the published name and arguments.

    `model_n`: number of stages; `model_n + stride - 1` must be torchrun's world size. `forecast`: "none", and
    `freshness`: "paper", unless asked otherwise. Moves the pipeline to the GPU of this rank, where there is
    one, and initialises the default process group if the script has not, because scripts ask it for their
    rank. Started by plain `python`, it takes as many GPUs of this machine, or else runs all stages in this
    process and warns: the same picture, no gain. Raises `ConfigurationError` on every rank where the numbers
    do not fit.
    """

    def __init__(
        self,
        pipeline: Any,
        model_n: int = 2,
        stride: int = 1,
        warm_up: int = 1,
        time_shift: bool = False,
        *,
        forecast: str = "none",
        freshness: str = "paper",
    ) -> None:
        settings = Settings(model_n, stride, warm_up, time_shift, forecast, freshness)
        denoisers_of(pipeline)
        _check_world_size(settings)
        ensure_default_group("nccl" if torch.cuda.is_available() else "gloo")
        self.pipeline = pipeline
        self.model_n = model_n
        self.stride = stride
        self.warm_up = warm_up
        self.time_shift = time_shift
        devices, runtime = _placement(pipeline, settings)
        self.handle: Handle = parallelize(
            pipeline,
            devices,
            num_stages=model_n,
            stride=stride,
            warmup_steps=warm_up,
            time_shift=time_shift,
            forecast=forecast,
            freshness=freshness,
            guidance="together",
            runtime=runtime,
        )

    def reset_state(self, warm_up: int = 1) -> None:
        """Set how many steps the next runs do in order. States need no reset: every run starts with none."""
        self.handle.set(warmup_steps=warm_up)
        self.warm_up = warm_up


def _check_world_size(settings: Settings) -> None:
    world_size = torchrun_world_size()
    if is_started_by_torchrun() and world_size != settings.num_workers:
        raise ConfigurationError(
            f"The strategy is not compatible with the number of devices: model_n={settings.num_stages} with "
            f"stride={settings.stride} needs {settings.num_workers} (model_n + stride - 1), but the world "
            f"size is {world_size}. Start the script with: torchrun --nproc-per-node {settings.num_workers} "
            "..."
        )


def _placement(pipeline: Any, settings: Settings) -> tuple[list[str] | None, str]:
    """Devices and runtime for `parallelize`; moves the driver's pipeline to its GPU."""
    if is_started_by_torchrun():
        return _torchrun_devices(pipeline, settings.num_workers), "torchrun"
    if settings.num_workers <= torch.cuda.device_count():
        pipeline.to("cuda:0")
        return [f"cuda:{index}" for index in range(settings.num_workers)], "auto"
    if settings.num_workers > 1:
        warn_user(
            f"started without torchrun on a machine with {torch.cuda.device_count()} CUDA devices, so all "
            "stages run in this process, without gain. Use: torchrun --nproc-per-node "
            f"{settings.num_workers} ..."
        )
    if torch.cuda.is_available():
        pipeline.to("cuda:0")
    return None, "local"


def _torchrun_devices(pipeline: Any, world_size: int) -> list[str]:
    """One name per rank; the first is where the driver's pipeline is, a worker takes its local rank's GPU."""
    if not torch.cuda.is_available():
        return ["cpu"] * world_size
    driver = f"cuda:{torchrun_local_rank()}"
    if torchrun_rank() == 0:
        torch.cuda.set_device(driver)
        pipeline.to(driver)
    return [driver] + ["cuda"] * (world_size - 1)

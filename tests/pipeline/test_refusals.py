"""What cannot be done is refused with one clear error, before anything is started or moved."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from random_pipelines import generate, sd
from torch import nn

import asyncdiff
from asyncdiff.errors import ConfigurationError, ParallelizedError, UnsupportedDenoiserError

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "No devices were given"),
        ({"devices": ["gpu"]}, "'gpu' is not a device"),
        ({"devices": ["cpu", "cpu:x"]}, "'cpu:x' is not a device"),
        ({"devices": ["cpu", "meta"]}, "'meta' was given, but stages run on"),
        ({"devices": ["cpu", "cuda:7"]}, "'cuda:7' was given, but this machine has"),
        ({"devices": ["cuda:7", "cpu"]}, "'cuda:7' was given, but this machine has"),
        ({"devices": 0}, "devices=0 was given, but at least one is needed"),
        ({"devices": True}, "devices must be a number or a list of names"),
        ({"devices": []}, "devices is empty"),
        ({"devices": 1.5}, "devices must be a number or a list of names"),
        ({"devices": ["cpu", 3]}, "3 is not a device"),
        ({"devices": 2, "num_stages": 3}, r"num_stages=3 with stride=1 needs 3 devices .* but 2 were given"),
        ({"devices": 3, "num_stages": 3, "stride": 2}, "needs 4 devices"),
        ({"devices": 1, "stride": 2}, "stride=2 needs at least 2 devices"),
        ({"num_stages": 0}, "num_stages must be at least 1"),
        ({"num_stages": "2"}, "num_stages must be an integer"),
        ({"num_stages": 2, "stride": 0}, "stride must be at least 1"),
        ({"num_stages": 2, "stride": 1.0}, "stride must be an integer"),
        ({"num_stages": 2, "warmup_steps": 0}, "warmup_steps must be at least 1"),
        ({"num_stages": 2, "time_shift": 1}, "time_shift must be True or False"),
        ({"num_stages": 2, "forecast": "cubic"}, 'forecast must be "none", "linear", "damped" or "latents"'),
        ({"num_stages": 2, "runtime": "thread"}, "runtime must be one of auto, local, spawn, torchrun"),
        ({"runtime": "torchrun"}, "was not started by torchrun"),
        ({"num_stages": 2, "partition": "ring"}, "partition must be 'chain', 'nested' or one list"),
        (
            {"num_stages": 2, "partition": ["conv_in", "conv_out"]},
            "partition must be 'chain', 'nested' or one list",
        ),
        ({"num_stages": 2, "partition": 7}, "partition must be 'chain', 'nested' or one list"),
        ({"num_stages": 3, "partition": [["conv_in"], ["conv_out"]]}, "lists 2 stages, but num_stages=3"),
        ({"plan": "plan.json"}, r"plan must be a Plan .* Plan\.load"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    pipe = sd()
    before = dict(vars(pipe.unet))
    with pytest.raises(ConfigurationError, match=message):
        asyncdiff.parallelize(pipe, **arguments)
    assert vars(pipe.unet) == before


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (
            [["conv_in", "down_blokcs"], ["up_blocks"]],
            "Stage 0 .* names 'down_blokcs', .*Perhaps down_blocks",
        ),
        ([["conv_in"], ["up_blocks", "unet.conv_out"]], "Stage 1 .* names 'unet.conv_out'"),
        (
            [["down_blocks", "mid_block"], ["mid_block"]],
            "repeats 'mid_block' .of stage 1.: stage 0 lists 'mid_block'",
        ),
        ([["down_blocks"], ["down_blocks.0.resnets"]], "repeats 'down_blocks.0.resnets' .* 'down_blocks'"),
        ([["conv_in"], []], "Stage 1 of the partition is empty"),
    ],
    ids=str,
)
def test_partition_that_names_what_is_not_there_or_twice_is_refused(
    partition: list[list[str]], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        asyncdiff.parallelize(sd(), num_stages=2, partition=partition)


@pytest.mark.parametrize("devices", [None, 2], ids=["local", "spawn"])
def test_partition_that_misses_a_block_is_refused_by_the_first_call(devices: int | None) -> None:
    """Which modules are called is known when the first inputs are; then nothing has been moved yet."""
    pipe = sd()
    exact = generate(pipe)
    partition = [["conv_in", "down_blocks"], ["mid_block", "conv_out"]]
    with asyncdiff.parallelize(pipe, devices, num_stages=2, partition=partition):
        with pytest.raises(ConfigurationError, match=r"misses block.* up_blocks"):
            generate(pipe)
        pipe.unet.conv_out.weight.sum().item()  # still here
    assert torch.equal(generate(pipe), exact)


@pytest.mark.parametrize("what", [None, "a model id", 3, nn.Linear(1, 1), DDIMScheduler()])
def test_what_is_no_pipeline_is_refused(what: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{type(what).__name__} has no denoiser"):
        asyncdiff.parallelize(what, num_stages=2)


def test_pipeline_without_denoiser_is_refused() -> None:
    pipe = sd()
    pipe.unet = None
    with pytest.raises(ConfigurationError, match="StableDiffusionPipeline has no denoiser"):
        asyncdiff.parallelize(pipe, num_stages=2)


def test_offloading_is_refused() -> None:
    pipe = sd()
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ConfigurationError, match="under CPU or group offloading"):
        asyncdiff.parallelize(pipe, num_stages=2)


def test_accelerate_hooks_are_refused() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    pipe = sd()
    add_hook_to_module(pipe.unet, AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(ConfigurationError, match="UNet2DConditionModel is under CPU or group offloading"):
        asyncdiff.parallelize(pipe, num_stages=2)


def test_device_map_is_refused() -> None:
    pipe = sd()
    pipe.hf_device_map = {"unet": "cpu"}
    with pytest.raises(ConfigurationError, match="loaded with a device_map"):
        asyncdiff.parallelize(pipe, num_stages=2)


def test_weights_on_several_devices_are_refused() -> None:
    pipe = sd()
    pipe.unet.conv_out.to("meta")
    with pytest.raises(ConfigurationError, match="weights are on cpu, meta"):
        asyncdiff.parallelize(pipe, num_stages=2)


def test_denoiser_compiled_as_a_whole_is_refused() -> None:
    pipe = sd()
    pipe.unet.compile()
    with pytest.raises(ConfigurationError, match="compiled as a whole"):
        asyncdiff.parallelize(pipe, num_stages=2)


def test_already_parallelized_is_refused() -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, num_stages=2):
        with pytest.raises(ConfigurationError, match=r"already parallelized.*handle\.remove\(\)"):
            asyncdiff.parallelize(pipe, num_stages=3)
        generate(pipe)


class Undecided(ModelMixin, ConfigMixin):
    """What it does next depends on hidden states."""

    @register_to_config
    def __init__(
        self, in_channels: int = 4, sample_size: int = 8, time_cond_proj_dim: int | None = None
    ) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(in_channels, in_channels, 1) for _ in range(2))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **ignored: Any) -> tuple[torch.Tensor]:
        hidden = self.first(sample)
        return (self.second(hidden if hidden.mean() > 0 else -hidden),)


def test_denoiser_that_branches_on_hidden_states_is_refused_by_name() -> None:
    torch.manual_seed(0)
    pipe = sd(unet=Undecided().eval())
    exact = generate(pipe)
    with asyncdiff.parallelize(pipe, num_stages=2):
        with pytest.raises(UnsupportedDenoiserError, match=r"the denoiser itself.*steer the forward"):
            generate(pipe)
    assert torch.equal(generate(pipe), exact)


@pytest.mark.parametrize("devices", [None, 2], ids=["local", "spawn"])
def test_denoiser_answers_as_before_and_refuses_what_would_see_a_part(
    devices: int | None, tmp_path: Any
) -> None:
    pipe = sd()
    unet = pipe.unet
    before = (unet.device, unet.dtype, dict(unet.config), unet.num_parameters(), pipe.device, pipe.dtype)
    with asyncdiff.parallelize(pipe, devices, num_stages=2):
        generate(pipe)
        assert (
            unet.device,
            unet.dtype,
            dict(unet.config),
            unet.num_parameters(),
            pipe.device,
            pipe.dtype,
        ) == before
        assert unet.to("cpu") is unet
        assert pipe.to("cpu", torch.float32) is pipe
        refused = {
            "unet to": lambda: unet.to(torch.bfloat16),
            "pipe to": lambda: pipe.to("meta"),
            "half": unet.half,
            "cuda": unet.cuda,
            "save": lambda: unet.save_pretrained(tmp_path),
            "save pipe": lambda: pipe.save_pretrained(tmp_path),
            "state_dict": unet.state_dict,
            "load_state_dict": lambda: unet.load_state_dict({}),
            "offload": lambda: pipe.enable_model_cpu_offload(device="cpu"),
            "sequential": lambda: pipe.enable_sequential_cpu_offload(device="cpu"),
            "group": lambda: unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
        }
        for refuse in refused.values():
            with pytest.raises(ParallelizedError, match=r"handle\.remove\(\)"):
                refuse()
    assert not list(tmp_path.iterdir())


def test_gradients_are_refused() -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, num_stages=2):
        generate(pipe)
        sample = torch.randn(1, 4, 8, 8, requires_grad=True)
        with pytest.raises(ParallelizedError, match="Gradients through the denoiser"):
            pipe.unet(sample, torch.tensor(1), torch.randn(1, 5, 8))


def test_report_before_the_first_run_is_refused() -> None:
    with asyncdiff.parallelize(sd(), num_stages=2) as handle:
        with pytest.raises(ParallelizedError, match="no run to report"):
            _ = handle.last_run
        with pytest.raises(ConfigurationError, match="warmup_steps must be at least 1"):
            handle.set(warmup_steps=0)


def test_stride_with_a_noise_scheduler_that_cannot_tell_is_refused() -> None:
    """The denoiser gets something else than what the noise scheduler has scaled: nobody knows the factor."""
    from diffusers import EulerDiscreteScheduler

    pipe = sd(scheduler=EulerDiscreteScheduler())

    def generate_with_louder_latents() -> torch.Tensor:
        parallel = vars(pipe.unet)["forward"]
        pipe.unet.forward = lambda sample, *args, **kwargs: parallel(sample * 1.5, *args, **kwargs)
        try:
            return generate(pipe)
        finally:
            pipe.unet.forward = parallel

    with asyncdiff.parallelize(pipe, num_stages=2, stride=2, forecast="linear"):
        with pytest.raises(
            ConfigurationError, match=r"^stride=2 .* EulerDiscreteScheduler .*\. Use stride=1, or .*\.$"
        ):
            generate_with_louder_latents()
        generate(pipe)
    for ways in ({"forecast": "linear"}, {"stride": 2}):  # latents that are continued need no factor
        with asyncdiff.parallelize(pipe, num_stages=2, **ways):
            generate_with_louder_latents()


def test_refusals_leave_no_process() -> None:
    before = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    with pytest.raises(ConfigurationError):
        asyncdiff.parallelize(sd(), ["cpu", "cpu", "cpu"], num_stages=2)
    after = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    assert after.count("asyncdiff.worker") <= before.count("asyncdiff.worker")

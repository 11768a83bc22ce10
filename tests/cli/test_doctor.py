"""`asyncdiff doctor` says what is there and what works."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMPipeline, DDPMScheduler

import asyncdiff
from asyncdiff.cli.app import build_app
from asyncdiff.cli.doctor import missing_packages, run_checks
from asyncdiff.cli.failures import run
from asyncdiff.demo import DEMO_MODEL, load_demo_pipeline
from asyncdiff.launch.probe import ProbeResult, _run_all, round_trip
from asyncdiff.pipeline.all_denoisers import examine_denoisers
from asyncdiff.pipeline.denoiser import denoisers_of
from asyncdiff.pipeline.examination import Examination
from asyncdiff.tiny import TINY_PIPELINES, tiny_pipeline
from asyncdiff.tiny.text import T5_WIDTH, t5

CPU = [{"name": "cpu", "kind": "cpu", "cores": 2}]


def test_doctor_writes_what_it_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "doctor.json"
    assert run(build_app(), ["doctor", "--json", str(file)]) == 0
    findings = json.loads(file.read_text())
    assert findings["packages"]["torch"]
    assert findings["devices"][0]["kind"] == "cpu"
    assert findings["devices"][0]["cores"] >= 1
    works = {check["name"]: check["works"] for check in findings["checks"]}
    assert works["spawn on CPUs (gloo)"]
    assert works["torchrun"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in works)


def test_nothing_is_missing_in_the_pinned_environment() -> None:
    assert missing_packages() == []


def test_without_torch_nothing_is_tried() -> None:
    def fail(*_: object) -> None:
        raise AssertionError("something was tried")

    (check,) = run_checks(CPU, ["torch>=2.13"], fail)
    assert not check.works


def test_nothing_usable_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("asyncdiff.cli.doctor.missing_packages", lambda: ["torch>=2.13"])
    assert run(build_app(), ["doctor"]) == 1
    assert "pip install 'torch>=2.13'" in capsys.readouterr().out


def test_probe_reports_a_device_that_is_not_there() -> None:
    result = round_trip("gloo", ("cpu", "cuda:63"), timeout_s=60)
    assert not result.works
    assert result.why_not


def test_probe_that_hangs_ends_within_its_timeout() -> None:
    result = _run_all([[sys.executable, "-c", "import time; time.sleep(60)"]], 0.5)
    assert result == ProbeResult(False, result.seconds, "no answer within 0.5 s")
    assert result.seconds < 10


def verdict_on(model: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and what was written."""
    file = model.parent / "verdict.json"
    code = run(build_app(), ["doctor", "--model", str(model), "--json", str(file), *options])
    return code, json.loads(file.read_text())


def test_demo_model_is_cut_where_parallelize_cuts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.symlink_to(DEMO_MODEL)
    code, verdict = verdict_on(model)
    plan = asyncdiff.plan(load_demo_pipeline(), ["cpu", "cpu"], guidance="together")
    assert plan.predictions is not None
    assert code == 0
    assert verdict["from_configs"]
    (unet,) = verdict["denoisers"]
    assert (unet["name"], unet["class_name"]) == ("unet", "UNet2DConditionModel")
    assert [stage["num_blocks"] for stage in unet["stages"]] == [len(names) for names in plan.stages]
    assert unet["stages"][0]["blocks"][0][0] == plan.stages[0][0]
    assert unet["stages"][1]["blocks"] == [[plan.stages[1][0], plan.stages[1][-1]]]
    assert [stage["weight_bytes"] for stage in unet["stages"]] == list(plan.predictions.parameter_bytes)
    assert unet["crossing_bytes_per_step"] == plan.predictions.crossing_bytes_per_step
    printed = capsys.readouterr().out
    assert plan.stages[1][-1] in printed


def test_transformer_folder_is_judged_without_its_weights(tmp_path: Path) -> None:
    model = tmp_path / "sd3"
    tiny_pipeline("sd3").save_pretrained(model)
    for weights in model.rglob("*.safetensors"):
        weights.unlink()
    code, verdict = verdict_on(model, "--stages", "3")
    assert code == 0
    assert verdict["from_configs"]
    (transformer,) = verdict["denoisers"]
    assert verdict["num_stages"] == len(transformer["stages"]) == 3
    assert transformer["crossing_bytes_per_step"] > 0


def test_more_stages_than_blocks_is_exit_code_1(tmp_path: Path) -> None:
    model = tmp_path / "sd3"
    tiny_pipeline("sd3").save_pretrained(model)
    code, verdict = verdict_on(model, "--stages", "500")
    assert code == 1
    assert "Use fewer stages" in verdict["denoisers"][0]["why_not"]


@pytest.mark.parametrize(
    "family",
    [
        "sdxl-inpainting",  # pictures to start from, and an autoencoder that the pipeline converts
        *(
            pytest.param(name, marks=pytest.mark.wide)
            for name in ("x4-upscaler", "controlnet-sd15", "svd", "animatediff", "unconditional-ddpm")
        ),
    ],
)
def test_example_call_is_found_for_other_pipelines(family: str, tmp_path: Path) -> None:
    model = tmp_path / family
    tiny_pipeline(family).save_pretrained(model)
    code, verdict = verdict_on(model)
    assert code == 0
    assert verdict["from_configs"]


def wan_2_2() -> Any:
    """With a text encoder, which the stand-in has not."""
    pipe = tiny_pipeline("wan-2.2")
    encoder, tokenizer = t5()
    pipe.register_modules(text_encoder=encoder, tokenizer=tokenizer)
    for name in TINY_PIPELINES["wan-2.2"].denoisers:
        denoiser = getattr(pipe, name)
        config = {**denoiser.config, "text_dim": T5_WIDTH, "rope_max_seq_len": 64}
        # So that one is told from the other.
        config["num_layers"] += name == "transformer_2"
        setattr(pipe, name, type(denoiser).from_config(config))
    return pipe


def test_every_denoiser_is_looked_at_also_one_that_is_called_after_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "wan"
    pipe = wan_2_2()
    pipe.save_pretrained(model)
    code, verdict = verdict_on(model, "--stages", "3")
    assert code == 0
    assert verdict["from_configs"]
    assert [each["name"] for each in verdict["denoisers"]] == ["transformer", "transformer_2"]
    printed = capsys.readouterr().out
    for each in verdict["denoisers"]:
        assert each["can_be_divided"]
        assert len(each["stages"]) == 3
        denoiser = getattr(pipe, each["name"])
        assert each["stages"][-1]["blocks"][-1][-1].startswith(
            ("proj_out", f"blocks.{len(denoiser.blocks) - 1}")
        )
        assert sum(stage["weight_bytes"] for stage in each["stages"]) >= sum(
            tensor.nbytes for tensor in denoiser.parameters()
        )
        assert f"{each['name']} (WanTransformer3DModel)" in printed


def test_denoisers_of_a_pipeline_of_pipelines_are_looked_at_in_the_order_of_their_calls() -> None:
    pipe = tiny_pipeline("stable-cascade")
    found = examine_denoisers(pipe, weights_at_hand=True)
    assert list(found) == list(denoisers_of(pipe))
    assert all(isinstance(each, Examination) for each in found.values()), found
    assert "forward" not in vars(pipe.prior_prior)
    assert "forward" not in vars(pipe.decoder)


TOY = """
import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput


class LooksAtItsBlocks(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, sample_size=8, in_channels=3):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, sample, timestep, return_dict=True):
        for block in self.blocks:
            sample = block(sample)
            if sample.mean() > 0:
                sample = -sample
        return UNet2DOutput(sample)
"""


def save_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> Path:
    (tmp_path / "toy_denoiser.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "toy_denoiser", raising=False)
    toy = importlib.import_module("toy_denoiser")
    model = tmp_path / "toy"
    DDPMPipeline(unet=toy.LooksAtItsBlocks(**config), scheduler=DDPMScheduler()).save_pretrained(model)
    return model


def test_denoiser_in_the_way_is_named_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_toy(tmp_path, monkeypatch)
    code, verdict = verdict_on(model)
    assert code == 1
    (unet,) = verdict["denoisers"]
    assert "denoiser itself" in unet["why_not"]
    assert "'blocks.0'" in unet["why_not"]
    assert (unet["name"], unet["class_name"]) == ("unet", "LooksAtItsBlocks")
    assert "'blocks.0'" in capsys.readouterr().out


def test_weights_are_loaded_where_configs_are_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("a quantised network needs its files")

    monkeypatch.setattr("asyncdiff.cli.model_check.load_without_weights", refuse)
    model = tmp_path / "sd3"
    tiny_pipeline("sd3").save_pretrained(model)
    code, verdict = verdict_on(model)
    assert code == 0
    assert not verdict["from_configs"]
    assert "Loading the weights" in capsys.readouterr().err


def test_failed_example_call_is_told_from_a_module_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_toy(tmp_path, monkeypatch, sample_size=None)  # which the pipeline counts with
    code, verdict = verdict_on(model)
    assert code == 1
    assert "an example call of the pipeline failed: TypeError" in verdict["denoisers"][0]["why_not"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "here"], "no model_index.json"),
        (["--model", "./nowhere"], "no such folder"),
        (["--model", "here", "--stages", "1"], "--stages 1"),
        (["--stages", "2"], "--model"),
    ],
)
def test_what_is_no_pipeline_is_bad_usage(
    options: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run(build_app(), ["doctor", *options]) == 2
    assert said in capsys.readouterr().err

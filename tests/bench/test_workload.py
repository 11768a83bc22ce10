"""What can be benchmarked, and what one call of it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asyncdiff.bench import workload
from asyncdiff.bench.workload import (
    DEMO,
    Workload,
    denoiser_bytes,
    dtype_of_random_weights,
    load,
    run_timed,
)
from asyncdiff.demo import DEMO_MODEL
from asyncdiff.errors import AsyncDiffError, ConfigurationError
from asyncdiff.tiny import TINY_PIPELINES


@pytest.mark.parametrize("model", [DEMO, str(DEMO_MODEL)])
def test_bundled_pipeline_is_called_with_so_many_steps(model: str) -> None:
    subject = load(Workload(None, model, None, "float32", "a red circle"), "cpu")
    assert denoiser_bytes(subject) == sum(p.nbytes for p in subject.pipe.unet.parameters()) > 10**6
    run = run_timed(subject, 4)
    assert len(run.step_ends) == 4
    assert 0 < run.step_ends[0] < run.step_ends[-1] < run.seconds  # the autoencoder comes after the last step


def test_loop_is_called_with_so_many_steps() -> None:
    subject = load(Workload("demo", None, 64, "float32"), "cpu")
    run = run_timed(subject, 3)
    assert len(run.step_ends) == 3
    assert run.step_ends[-1] <= run.seconds


def test_pipeline_that_takes_no_prompt_is_refused(tmp_path: Path) -> None:
    TINY_PIPELINES["svd"].build().save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"StableVideoDiffusionPipeline does not take prompt"):
        load(Workload(None, str(tmp_path), None, "float32", "a red circle"), "cpu")


def test_missing_model_is_named() -> None:
    with pytest.raises(AsyncDiffError, match="Cannot load --model nobody/nothing: "):
        load(Workload(None, "nobody/nothing", None, "float32"), "cpu")


def test_title_says_what_it_is() -> None:
    assert Workload("sdxl", None, 256, "bfloat16").title == "sdxl, 256 px, bfloat16"
    assert Workload(None, "me/model", None, "auto").title == "me/model, the default dtype"
    title = Workload("sdxl", None, 256, "bfloat16", channels_last=True).title
    assert title == "sdxl, 256 px, bfloat16, channels last"


@pytest.mark.parametrize(
    ("can_do", "devices", "dtype"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, ["cpu", "cpu"], "float32"),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, ["cuda:0", "cpu"], "float32"),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, ["cuda:0", "cuda:1"], "bfloat16"),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, ["cpu", "cpu"], "bfloat16"),
        ({"neon": True, "bf16": True}, ["cpu"], "bfloat16"),
        ({"neon": True}, ["cpu"], "float32"),
    ],
)
def test_random_weights_are_in_bfloat16_where_it_is_computed(
    can_do: dict[str, bool], devices: list[str], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can_do)
    assert dtype_of_random_weights("auto", devices) == dtype
    assert dtype_of_random_weights("float16", devices) == "float16"


def test_channels_last_are_the_convolutions_of_the_denoiser() -> None:
    plain, subject = (
        load(Workload("demo", None, 64, "float32", channels_last=on), "cpu") for on in (False, True)
    )
    before = dict(plain.pipe.denoiser.named_parameters())
    for name, weight in subject.pipe.denoiser.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.dim() != 4 or weight.is_contiguous(memory_format=torch.channels_last)
    assert run_timed(subject, 2).seconds > 0


@pytest.mark.parametrize(("family", "what"), [("wan-2.1", "some of five"), ("flux", "none")])
def test_channels_last_without_pictures_is_refused(
    family: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload, "load_pipeline", lambda *ignored: TINY_PIPELINES[family].build())
    with pytest.raises(ConfigurationError, match=rf"^--channels-last .* has {what}\.$"):
        load(Workload(None, family, None, "float32", "a red circle", channels_last=True), "cpu")


def test_weights_of_a_denoiser_are_its_buffers_too() -> None:
    subject = load(Workload("demo", None, 64, "float32"), "cpu")
    before = denoiser_bytes(subject)
    subject.pipe.denoiser.register_buffer("positions", torch.zeros(1000))
    assert denoiser_bytes(subject) == before + 4000

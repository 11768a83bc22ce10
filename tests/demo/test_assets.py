"""The bundled pipeline as it is shipped: small, half precision, complete, loads without a network."""

import json
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from asyncdiff.demo import DEMO_MODEL, GUIDANCE_SCALE, load_demo_pipeline
from asyncdiff.demo.vocabulary import build_tokenizer

_WEIGHTS = {
    "unet": DEMO_MODEL / "unet" / "diffusion_pytorch_model.safetensors",
    "vae": DEMO_MODEL / "vae" / "diffusion_pytorch_model.safetensors",
    "text_encoder": DEMO_MODEL / "text_encoder" / "model.safetensors",
}


def test_folder_is_at_most_25_megabytes() -> None:
    assert sum(path.stat().st_size for path in DEMO_MODEL.rglob("*") if path.is_file()) <= 25_000_000


@pytest.mark.parametrize("weights", _WEIGHTS.values(), ids=_WEIGHTS.keys())
def test_weights_are_half_precision_and_finite(weights: Path) -> None:
    with safe_open(weights, framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (safe_open is no mapping)
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_unet_has_five_to_ten_million_parameters() -> None:
    with safe_open(_WEIGHTS["unet"], framework="pt") as file:
        parameters = sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert 5_000_000 <= parameters <= 10_000_000


def test_unet_is_built_like_stable_diffusions() -> None:
    config = json.loads((DEMO_MODEL / "unet" / "config.json").read_text())
    assert config["down_block_types"] == ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
    assert config["up_block_types"] == ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
    assert config["layers_per_block"] == 2


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_pipeline_loads_in_the_asked_precision(
    dtype: torch.dtype | None, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe = load_demo_pipeline(dtype)
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == (dtype or torch.float32)
    assert pipe.safety_checker is None
    assert pipe.feature_extractor is None
    assert not pipe.config.requires_safety_checker
    assert capfd.readouterr().out == ""


def test_shipped_tokenizer_is_the_one_the_grammar_gives() -> None:
    assert load_demo_pipeline().tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_training_record_names_command_and_guidance() -> None:
    record = json.loads((DEMO_MODEL / "training.json").read_text())
    assert record["command"].startswith("python -m asyncdiff.demo.train ")
    assert record["guidance_scale"] == GUIDANCE_SCALE
    assert set(record["versions"]) == {"python", "torch", "diffusers", "transformers"}
    assert record["settings"]["seed"] == 0
    assert len(record["losses_per_100_steps"]["unet"]) == -(-record["settings"]["unet_steps"] // 100)

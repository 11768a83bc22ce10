"""The bundled pipelines as they are shipped: small, half precision, complete, loaded without a network."""

import json
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from asyncdiff.demo import DEMO_MODEL, DEMO_MODELS, GUIDANCE_SCALE, DemoModel, load_demo_pipeline
from asyncdiff.demo.vocabulary import build_tokenizer

MODELS = pytest.mark.parametrize("model", DEMO_MODELS.values(), ids=DEMO_MODELS)
TRANSFORMER = DEMO_MODELS["transformer"]


def _config(model: DemoModel, part: str, file: str = "config.json") -> dict:
    return json.loads((model.folder / part / file).read_text())


def _parameters(weights: Path) -> int:
    with safe_open(weights, framework="pt") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)


@MODELS
def test_folder_is_at_most_20_megabytes(model: DemoModel) -> None:
    assert sum(path.stat().st_size for path in model.folder.rglob("*") if path.is_file()) <= 20_000_000


@MODELS
def test_weights_are_half_precision_and_finite(model: DemoModel) -> None:
    files = list(model.folder.rglob("*.safetensors"))
    assert len(files) == {"unet": 3, "transformer": 4}[model.name]
    for weights in files:
        tensors = load_file(weights).values()
        assert {tensor.dtype for tensor in tensors} == {torch.float16}
        assert all(tensor.isfinite().all() for tensor in tensors)


def test_unet_has_five_to_ten_million_parameters() -> None:
    assert 5_000_000 <= _parameters(DEMO_MODEL / "unet/diffusion_pytorch_model.safetensors") <= 10_000_000


def test_transformer_has_three_to_eight_million_parameters() -> None:
    weights = TRANSFORMER.folder / "transformer/diffusion_pytorch_model.safetensors"
    assert 3_000_000 <= _parameters(weights) <= 8_000_000


def test_unet_is_built_like_stable_diffusions() -> None:
    config = _config(DEMO_MODELS["unet"], "unet")
    assert config["down_block_types"] == ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
    assert config["up_block_types"] == ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
    assert config["layers_per_block"] == 2


def test_transformer_is_built_like_stable_diffusion_3s() -> None:
    config = _config(TRANSFORMER, "transformer")
    assert config["_class_name"] == "SD3Transformer2DModel"
    assert (config["sample_size"], config["patch_size"], config["pos_embed_max_size"]) == (8, 1, 8)
    assert (config["num_layers"], config["qk_norm"]) == (8, "rms_norm")
    encoders = [_config(TRANSFORMER, part) for part in ("text_encoder", "text_encoder_2")]
    assert config["joint_attention_dim"] == sum(encoder["hidden_size"] for encoder in encoders)
    assert config["pooled_projection_dim"] == sum(encoder["projection_dim"] for encoder in encoders)
    scheduler = _config(TRANSFORMER, "scheduler", "scheduler_config.json")
    assert scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"


def test_both_have_the_same_autoencoder() -> None:
    file = "vae/diffusion_pytorch_model.safetensors"
    first, second = (load_file(model.folder / file) for model in DEMO_MODELS.values())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [_config(model, "vae") for model in DEMO_MODELS.values()]
    assert configs[0]["scaling_factor"] == configs[1]["scaling_factor"]
    assert [config["shift_factor"] for config in configs] == [None, 0.0]


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


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_transformer_pipeline_loads_in_the_asked_precision(dtype: torch.dtype | None) -> None:
    pipe = load_demo_pipeline(dtype, model="transformer")
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {part.dtype for part in parts} == {dtype or torch.float32}
    assert (pipe.text_encoder_3, pipe.tokenizer_3) == (None, None)


def test_shipped_tokenizers_are_the_one_the_grammar_gives() -> None:
    vocabulary = build_tokenizer().get_vocab()
    second = load_demo_pipeline(model="transformer")
    for tokenizer in (load_demo_pipeline().tokenizer, second.tokenizer, second.tokenizer_2):
        assert tokenizer.get_vocab() == vocabulary


@MODELS
def test_training_record_names_command_and_guidance(model: DemoModel) -> None:
    record = _config(model, ".", "training.json")
    assert record["command"].startswith("python -m asyncdiff.demo.train ")
    assert record["guidance_scale"] == model.guidance_scale
    assert set(record["versions"]) == {"python", "torch", "diffusers", "transformers"}
    assert record["settings"]["model"] == model.name
    assert record["settings"]["seed"] == 0
    steps = record["settings"]["denoiser_steps"]
    assert len(record["losses_per_100_steps"][model.name]) == -(-steps // 100)


def test_first_model_is_the_default() -> None:
    assert (DEMO_MODELS["unet"].folder, DEMO_MODELS["unet"].guidance_scale) == (DEMO_MODEL, GUIDANCE_SCALE)

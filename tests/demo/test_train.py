"""Training: two steps write a folder that loads, and the same command gives the same weights."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from asyncdiff.demo import DEMO_MODELS
from asyncdiff.demo.train import main
from asyncdiff.demo.training.settings import DEFAULT_SETTINGS, command

_VAE = "vae/diffusion_pytorch_model.safetensors"
_WEIGHTS = {
    "unet": ("unet/diffusion_pytorch_model.safetensors", _VAE, "text_encoder/model.safetensors"),
    "transformer": (
        "transformer/diffusion_pytorch_model.safetensors",
        _VAE,
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
    ),
}

_SHORT = (
    "--crop-steps 1 --autoencoder-steps 1 --denoiser-steps 2 --pictures 16 "
    "--autoencoder-batch 4 --denoiser-batch 4 --threads 1"
)


def _train(folder: Path, model: str, *more: str) -> Path:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        main(["--model", model, "--output", str(folder), *_SHORT.split(), *more])
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
    return folder


@pytest.fixture(scope="module", params=DEMO_MODELS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, _train(tmp_path_factory.mktemp("trained"), request.param)


def _is_equal(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_steps_write_a_folder_that_loads_and_draws(trained: tuple[str, Path]) -> None:
    name, folder = trained
    model = DEMO_MODELS[name]
    pipe = DiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, **model.load_arguments
    )
    pipe.set_progress_bar_config(disable=True)
    (picture,) = pipe("a small red circle", num_inference_steps=2, **model.call_arguments).images
    assert picture.size == (64, 64)
    assert json.loads((folder / "training.json").read_text())["settings"]["model"] == name


def test_same_seed_gives_the_same_weights(trained: tuple[str, Path], tmp_path: Path) -> None:
    model, folder = trained
    again = _train(tmp_path / "again", model)
    assert all(_is_equal(folder / weights, again / weights) for weights in _WEIGHTS[model])


def test_checkpoints_do_not_change_the_weights(trained: tuple[str, Path], tmp_path: Path) -> None:
    model, folder = trained
    again = _train(
        tmp_path / "out", model, "--checkpoints", str(tmp_path / "checkpoints"), "--checkpoint-every", "2"
    )
    assert (tmp_path / "checkpoints" / "reconstructions.png").is_file()
    assert (tmp_path / "checkpoints" / "step-000002" / "samples.png").is_file()
    assert all(_is_equal(folder / weights, again / weights) for weights in _WEIGHTS[model])


def test_given_autoencoder_is_used_as_it_is(trained: tuple[str, Path], tmp_path: Path) -> None:
    model, folder = trained
    again = _train(tmp_path / "out", model, "--autoencoder", str(folder / "vae"))
    assert _is_equal(folder / _VAE, again / _VAE)
    assert "autoencoder" not in json.loads((again / "training.json").read_text())["seconds"]


def test_another_seed_gives_other_weights(trained: tuple[str, Path], tmp_path: Path) -> None:
    model, folder = trained
    other = _train(tmp_path / "out", model, "--seed", "1")
    assert not any(_is_equal(folder / weights, other / weights) for weights in _WEIGHTS[model])


def test_recorded_command_names_what_differs_from_the_defaults() -> None:
    first, second = DEFAULT_SETTINGS["unet"], DEFAULT_SETTINGS["transformer"]
    assert command(first, None) == "python -m asyncdiff.demo.train --output DIR"
    assert command(second, Path("some/vae")) == (
        "python -m asyncdiff.demo.train --output DIR --model transformer --autoencoder some/vae"
    )

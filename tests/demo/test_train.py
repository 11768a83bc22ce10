"""Training: two steps write a folder that loads, and the same command gives the same weights."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from asyncdiff.demo.train import main

_WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)

_SHORT = (
    "--crop-steps 1 --autoencoder-steps 1 --unet-steps 2 --pictures 16 "
    "--autoencoder-batch 4 --unet-batch 4 --threads 1"
)


def _train(folder: Path, *more: str) -> Path:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        main(["--output", str(folder), *_SHORT.split(), *more])
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(tmp_path_factory.mktemp("trained"))


def _is_equal(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_steps_write_a_folder_that_loads_and_draws(trained: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(trained, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    (picture,) = pipe("a small red circle", num_inference_steps=2).images
    assert picture.size == (64, 64)


def test_same_seed_gives_the_same_weights(trained: Path, tmp_path: Path) -> None:
    again = _train(tmp_path / "again")
    assert all(_is_equal(trained / weights, again / weights) for weights in _WEIGHTS)


def test_checkpoints_do_not_change_the_weights(trained: Path, tmp_path: Path) -> None:
    again = _train(
        tmp_path / "out", "--checkpoints", str(tmp_path / "checkpoints"), "--checkpoint-every", "2"
    )
    assert (tmp_path / "checkpoints" / "reconstructions.png").is_file()
    assert (tmp_path / "checkpoints" / "step-000002" / "samples.png").is_file()
    assert all(_is_equal(trained / weights, again / weights) for weights in _WEIGHTS)


def test_given_autoencoder_is_used_as_it_is(trained: Path, tmp_path: Path) -> None:
    again = _train(tmp_path / "out", "--autoencoder", str(trained / "vae"))
    assert _is_equal(trained / _WEIGHTS[1], again / _WEIGHTS[1])


def test_another_seed_gives_other_weights(trained: Path, tmp_path: Path) -> None:
    other = _train(tmp_path / "out", "--seed", "1")
    assert not any(_is_equal(trained / weights, other / weights) for weights in _WEIGHTS)

"""What a training writes: the pipeline in half precision, how it came about, pictures on the way."""

import json
import math
import platform
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

from asyncdiff.demo import DEMO_CAPTIONS, DemoModel
from asyncdiff.demo.pictures import picture_batch
from asyncdiff.demo.training.loop import TrainingLog
from asyncdiff.demo.training.settings import TrainingSettings, command


def write_pipeline(
    pipe: DiffusionPipeline,
    output: Path,
    model: DemoModel,
    settings: TrainingSettings,
    autoencoder: Path | None,
    log: TrainingLog,
) -> None:
    """Writes a pipeline in float16, and how it came about."""
    parameters = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    _save_half(pipe, output)
    record = {
        "command": command(settings, autoencoder),
        "guidance_scale": model.guidance_scale,
        "settings": asdict(settings),
        "parameters": parameters,
        "seconds": {phase: round(seconds, 1) for phase, seconds in log.seconds.items()},
        "losses_per_100_steps": {
            phase: [round(loss, 5) for loss in losses] for phase, losses in log.losses.items()
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def write_checkpoint(pipe: DiffusionPipeline, folder: Path, model: DemoModel) -> None:
    """Writes a pipeline, and what it makes of the demo's captions."""
    _save_half(pipe, folder)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(index) for index in range(len(DEMO_CAPTIONS))]
    pictures = pipe(
        list(DEMO_CAPTIONS),
        num_inference_steps=25,
        guidance_scale=model.guidance_scale,
        generator=generators,
        **model.call_arguments,
    ).images
    _grid(pictures).save(folder / "samples.png")


@torch.no_grad()
def write_reconstructions(vae: AutoencoderKL, seed: int, file: Path) -> None:
    """Writes eight training pictures above what the autoencoder makes of them."""
    pictures = picture_batch(seed, range(8))
    decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
    values = torch.cat([pictures, decoded]).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    _grid([Image.fromarray(value.permute(1, 2, 0).numpy()) for value in values]).save(file)


def _save_half(pipe: DiffusionPipeline, output: Path) -> None:
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    for network in networks:
        network.half()
    pipe.save_pretrained(output)
    for name, part in pipe.components.items():
        if isinstance(part, CLIPTokenizer):
            # vocab.json and merges.txt, which older versions of transformers read
            part.backend_tokenizer.model.save(str(output / name))
    for network in networks:
        network.float()


def _grid(pictures: list[Image.Image], columns: int = 8) -> Image.Image:
    width, height = pictures[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height))
    for index, picture in enumerate(pictures):
        grid.paste(picture, (index % columns * width, index // columns * height))
    return grid

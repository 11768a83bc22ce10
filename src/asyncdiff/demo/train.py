"""Trains a bundled demo pipeline from nothing and writes it as a diffusers folder.

    python -m asyncdiff.demo.train --model unet|transformer --output DIR

Three phases: the autoencoder on pictures (or a given one, with `--autoencoder`); the latents of all training
pictures; the text encoders and the denoiser together on those latents. Every random number comes from
`--seed` and the amount of work is counted in steps, so the same command gives the same weights on the same
machine with the same versions and threads (sums differ in the last bit between thread counts).
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from rich.console import Console
from rich.progress import Progress

from asyncdiff.demo import DEMO_MODELS
from asyncdiff.demo.training.autoencoder import encode_pictures, train_autoencoder
from asyncdiff.demo.training.denoiser import DenoiserTraining
from asyncdiff.demo.training.loop import TrainingLog
from asyncdiff.demo.training.output import write_checkpoint, write_pipeline, write_reconstructions
from asyncdiff.demo.training.settings import COMMAND, DEFAULT_SETTINGS, TrainingSettings, option
from asyncdiff.demo.vocabulary import build_tokenizer


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    defaults = DEFAULT_SETTINGS[options.model]
    given = {name: value for name, value in vars(options).items() if name in asdict(defaults)}
    train(
        replace(defaults, **given),
        options.output,
        checkpoints=options.checkpoints,
        checkpoint_every=options.checkpoint_every,
        autoencoder=options.autoencoder,
    )


def train(
    settings: TrainingSettings,
    output: Path,
    *,
    checkpoints: Path | None = None,
    checkpoint_every: int = 1000,
    autoencoder: Path | None = None,
) -> None:
    """Trains a pipeline and writes it to `output`, with `training.json` beside its parts.

    With `checkpoints`, the autoencoder, and the pipeline after every `checkpoint_every` steps of the denoiser
    with a picture of its samples, are written there; that does not change the result. `autoencoder` is a
    folder with an autoencoder to use instead of training one.
    """
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    model = DEMO_MODELS[settings.model]
    log = TrainingLog()
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        if autoencoder is None:
            vae = train_autoencoder(settings, log, progress)
        else:
            vae = AutoencoderKL.from_pretrained(autoencoder)
        if checkpoints is not None:
            vae.save_pretrained(checkpoints / "vae")
            write_reconstructions(vae, settings.seed, checkpoints / "reconstructions.png")
        tokenizer = build_tokenizer()
        dataset = encode_pictures(vae, tokenizer, settings, log, progress)
        training = DenoiserTraining(settings, tokenizer)
        for step in training.steps(dataset, log, progress):
            if checkpoints is not None and step % checkpoint_every == 0:
                write_checkpoint(training.averaged_pipeline(vae), checkpoints / f"step-{step:06d}", model)
    write_pipeline(training.averaged_pipeline(vae), output, model, settings, autoencoder, log)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=DEMO_MODELS, default="unet", help="which bundled model (unet)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained pipeline")
    parser.add_argument(
        "--checkpoints", type=Path, help="folder for the pipeline and its samples during training"
    )
    parser.add_argument(
        "--autoencoder", type=Path, help="folder of an autoencoder to use instead of training one"
    )
    parser.add_argument("--checkpoint-every", type=int, default=1000, help="denoiser steps (1000)")
    for name, default in asdict(TrainingSettings()).items():
        if name != "model":
            defaults = sorted({str(getattr(settings, name)) for settings in DEFAULT_SETTINGS.values()})
            parser.add_argument(
                option(name), type=type(default), default=argparse.SUPPRESS, help=f"({' or '.join(defaults)})"
            )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

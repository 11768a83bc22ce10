"""Trains the bundled demo pipeline from nothing and writes it as a diffusers folder.

    python -m asyncdiff.demo.train --output DIR

Three phases: the autoencoder on pictures; the latents of all training pictures; the text encoder and the
U-Net together on those latents. Every random number comes from `--seed` and the amount of work is counted in
steps, so the same command gives the same weights on the same machine with the same versions and threads (sums
differ in the last bit between thread counts).
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch.nn.functional import l1_loss, mse_loss
from transformers import CLIPTokenizer

from asyncdiff.demo import DEMO_CAPTIONS, GUIDANCE_SCALE
from asyncdiff.demo.networks import build_autoencoder, build_noise_scheduler, build_text_encoder, build_unet
from asyncdiff.demo.pictures import crop_batch, picture_batch, picture_captions
from asyncdiff.demo.vocabulary import build_tokenizer

_REPORT_EVERY = 100  # steps
_ENCODING_BATCH = 128  # pictures
_WARMUP_FRACTION = 0.03
_MAX_GRADIENT_NORM = 1.0
_TRAINED_PARTS = ("vae", "text_encoder", "unet")
# Weighed against the mean absolute error of a channel in -1..1. Enough to keep the latents near a normal
# distribution and the decoder tolerant of small errors in them.
_KL_WEIGHT = 5e-4


@dataclass(frozen=True)
class TrainingSettings:
    """Everything the trained weights depend on, apart from versions and machine."""

    seed: int = 0
    threads: int = 2
    pictures: int = 24_000
    crop_steps: int = 1500
    autoencoder_steps: int = 250
    autoencoder_batch: int = 16
    autoencoder_rate: float = 1.5e-3
    unet_steps: int = 2800
    unet_batch: int = 32
    unet_rate: float = 1e-3
    caption_dropout: float = 0.1
    ema_decay: float = 0.998


@dataclass
class TrainingLog:
    """What happened: mean losses over each stretch of 100 steps, and the seconds each phase took."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LatentDataset:
    """The training pictures as the U-Net sees them: scaled latents as mean and deviation, and caption tokens.

    `mean` and `deviation` are float32 (pictures, 4, 8, 8), `tokens` is int64 (pictures, 32).
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    tokens: torch.Tensor


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parse(arguments)
    settings = TrainingSettings(**{name: getattr(options, name) for name in asdict(TrainingSettings())})
    train(
        settings,
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

    With `checkpoints`, the autoencoder, and the pipeline after every `checkpoint_every` U-Net steps with a
    picture of its samples, are written there; that does not change the result. `autoencoder` is a folder with
    an autoencoder to use instead of training one.
    """
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    log = TrainingLog()
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        if autoencoder is None:
            vae = train_autoencoder(settings, log, progress)
        else:
            vae = AutoencoderKL.from_pretrained(autoencoder)
        if checkpoints is not None:
            vae.save_pretrained(checkpoints / "vae")
            _reconstructions(vae, settings.seed).save(checkpoints / "reconstructions.png")
        tokenizer = build_tokenizer()
        dataset = encode_pictures(vae, tokenizer, settings, log, progress)
        training = DenoiserTraining(settings, tokenizer)
        for step in training.steps(dataset, log, progress):
            if checkpoints is not None and step % checkpoint_every == 0:
                _write_checkpoint(training.averaged_pipeline(vae), checkpoints / f"step-{step:06d}")
    write_pipeline(training.averaged_pipeline(vae), output, settings, log)


def train_autoencoder(settings: TrainingSettings, log: TrainingLog, progress: Progress) -> AutoencoderKL:
    """Trains the autoencoder, most of the time on crops, and measures its `scaling_factor`."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    # Channels last saves a fifth of a step's time here; it made no difference for the U-Net.
    vae = build_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), settings.autoencoder_rate, betas=(0.9, 0.99), fused=True)
    steps = settings.crop_steps + settings.autoencoder_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_and_cosine(steps))
    for step in _reported_steps("autoencoder", steps, log, progress):
        first = step.index * settings.autoencoder_batch
        draw_batch = crop_batch if step.index < settings.crop_steps else picture_batch
        numbers = [(first + place) % settings.pictures for place in range(settings.autoencoder_batch)]
        pictures = draw_batch(settings.seed, numbers)
        posterior = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        divergence = posterior.kl().sum() / posterior.mean.numel()
        loss = l1_loss(decoded, pictures) + 3 * mse_loss(decoded, pictures) + _KL_WEIGHT * divergence
        _update(loss, list(vae.parameters()), optimizer, schedule)
        step.loss = loss.item()
    vae.to(memory_format=torch.contiguous_format)
    vae.eval().requires_grad_(False)
    latents = vae.encode(picture_batch(settings.seed, range(min(settings.pictures, 512)))).latent_dist.sample(
        generator
    )
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    settings: TrainingSettings,
    log: TrainingLog,
    progress: Progress,
) -> LatentDataset:
    """Draws and encodes all training pictures once."""
    started = time.monotonic()
    means, deviations = [], []
    for first in progress.track(range(0, settings.pictures, _ENCODING_BATCH), description="encoding"):
        indices = range(first, min(first + _ENCODING_BATCH, settings.pictures))
        posterior = vae.encode(picture_batch(settings.seed, indices)).latent_dist
        means.append(posterior.mean * vae.config.scaling_factor)
        deviations.append(posterior.std * vae.config.scaling_factor)
    captions = picture_captions(settings.seed, range(settings.pictures))
    log.seconds["encoding"] = time.monotonic() - started
    return LatentDataset(torch.cat(means), torch.cat(deviations), _tokens(tokenizer, captions))


class DenoiserTraining:
    """The text encoder and the U-Net, trained together, and a moving average of their weights."""

    def __init__(self, settings: TrainingSettings, tokenizer: CLIPTokenizer) -> None:
        torch.manual_seed(settings.seed + 2)
        self.settings = settings
        self.tokenizer = tokenizer
        self.text_encoder = build_text_encoder(tokenizer)
        self.unet = build_unet()
        self.noise_scheduler = build_noise_scheduler()
        self._average = EMAModel(self._parameters(), decay=settings.ema_decay, foreach=True)

    def steps(self, dataset: LatentDataset, log: TrainingLog, progress: Progress) -> Iterator[int]:
        """Trains, and yields the number of steps done after each of them."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed + 3)
        optimizer = torch.optim.AdamW(self._parameters(), settings.unet_rate, betas=(0.9, 0.99), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_and_cosine(settings.unet_steps))
        batches = _epochs(len(dataset.mean), settings.unet_batch, generator)
        self.text_encoder.train()
        self.unet.train()
        for step in _reported_steps("unet", settings.unet_steps, log, progress):
            loss = self._loss(dataset, next(batches), generator)
            _update(loss, self._parameters(), optimizer, schedule)
            self._average.step(self._parameters())
            step.loss = loss.item()
            yield step.index + 1

    @torch.no_grad()
    def averaged_pipeline(self, vae: AutoencoderKL) -> StableDiffusionPipeline:
        """A pipeline with copies of the averaged weights."""
        unet, text_encoder = build_unet(), build_text_encoder(self.tokenizer)
        parameters = [*text_encoder.parameters(), *unet.parameters()]
        self._average.copy_to(parameters)
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder.eval(),
            tokenizer=self.tokenizer,
            unet=unet.eval(),
            scheduler=DDIMScheduler.from_config(self.noise_scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [*self.text_encoder.parameters(), *self.unet.parameters()]

    def _loss(self, dataset: LatentDataset, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        mean, deviation = dataset.mean[batch], dataset.deviation[batch]
        latents = mean + deviation * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = self._timesteps(len(batch), generator)
        tokens = self._without_some_captions(dataset.tokens[batch], generator)
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        target = self.noise_scheduler.get_velocity(latents, noise, timesteps)
        states = self.text_encoder(tokens).last_hidden_state
        return mse_loss(self.unet(noisy, timesteps, states).sample, target)

    def _timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """One timestep from each of `count` equal stretches: the loss varies less than with free draws."""
        places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        return (places * self.noise_scheduler.config.num_train_timesteps).long()

    def _without_some_captions(self, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Some captions made empty, for classifier-free guidance (Ho and Salimans 2022)."""
        empty = _tokens(self.tokenizer, [""])
        is_dropped = torch.rand(len(tokens), 1, generator=generator) < self.settings.caption_dropout
        return torch.where(is_dropped, empty, tokens)


def write_pipeline(
    pipe: StableDiffusionPipeline, output: Path, settings: TrainingSettings, log: TrainingLog
) -> None:
    """Writes a pipeline in float16, and how it came about."""
    parameters = {name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in _TRAINED_PARTS}
    _save_half(pipe, output)
    record = {
        "command": _command(settings),
        "guidance_scale": GUIDANCE_SCALE,
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


def _command(settings: TrainingSettings) -> str:
    """The command that trains with these settings, defaults left out."""
    defaults = asdict(TrainingSettings())
    changed = {name: value for name, value in asdict(settings).items() if value != defaults[name]}
    options = [f" {_option(name)} {value}" for name, value in changed.items()]
    return "python -m asyncdiff.demo.train --output DIR" + "".join(options)


def _option(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def _save_half(pipe: StableDiffusionPipeline, output: Path) -> None:
    parts = [getattr(pipe, name) for name in _TRAINED_PARTS]
    for part in parts:
        part.half()
    pipe.save_pretrained(output)
    # vocab.json and merges.txt, which older versions of transformers read
    pipe.tokenizer.backend_tokenizer.model.save(str(output / "tokenizer"))
    for part in parts:
        part.float()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m asyncdiff.demo.train", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained pipeline")
    parser.add_argument(
        "--checkpoints", type=Path, help="folder for the pipeline and its samples during training"
    )
    parser.add_argument(
        "--autoencoder", type=Path, help="folder of an autoencoder to use instead of training one"
    )
    parser.add_argument("--checkpoint-every", type=int, default=1000, help="U-Net steps (1000)")
    for name, default in asdict(TrainingSettings()).items():
        parser.add_argument(_option(name), type=type(default), default=default, help=f"({default})")
    return parser.parse_args(arguments)


@dataclass
class _Step:
    index: int
    loss: float = math.nan


def _reported_steps(phase: str, count: int, log: TrainingLog, progress: Progress) -> Iterator[_Step]:
    """Counts steps and keeps the books: the progress bar, a mean loss per stretch, the phase's seconds."""
    started = time.monotonic()
    losses: list[float] = []
    means = log.losses.setdefault(phase, [])
    for index in progress.track(range(count), description=phase):
        step = _Step(index)
        yield step
        losses.append(step.loss)
        log.seconds[phase] = time.monotonic() - started
        if len(losses) == _REPORT_EVERY or index == count - 1:
            means.append(sum(losses) / len(losses))
            losses.clear()
            progress.console.print(
                f"{phase} step {index + 1}: loss {means[-1]:.4f}, {log.seconds[phase]:.0f} s"
            )


def _tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    encoded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return encoded.input_ids


def _epochs(size: int, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches of indices, each picture once per epoch, in a new order every time."""
    while True:
        order = torch.randperm(size, generator=generator)
        yield from order.split(batch)


def _warmup_and_cosine(steps: int) -> Callable[[int], float]:
    warmup = max(1, round(_WARMUP_FRACTION * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def _update(
    loss: torch.Tensor,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)


def _write_checkpoint(pipe: StableDiffusionPipeline, folder: Path) -> None:
    _save_half(pipe, folder)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(index) for index in range(len(DEMO_CAPTIONS))]
    pictures = pipe(
        list(DEMO_CAPTIONS), num_inference_steps=25, guidance_scale=GUIDANCE_SCALE, generator=generators
    ).images
    _grid(pictures).save(folder / "samples.png")


@torch.no_grad()
def _reconstructions(vae: AutoencoderKL, seed: int) -> Image.Image:
    """Eight training pictures above what the autoencoder makes of them."""
    pictures = picture_batch(seed, range(8))
    decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
    values = torch.cat([pictures, decoded]).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return _grid([Image.fromarray(value.permute(1, 2, 0).numpy()) for value in values])


def _grid(pictures: list[Image.Image], columns: int = 8) -> Image.Image:
    width, height = pictures[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height))
    for index, picture in enumerate(pictures):
        grid.paste(picture, (index % columns * width, index // columns * height))
    return grid


if __name__ == "__main__":
    main()

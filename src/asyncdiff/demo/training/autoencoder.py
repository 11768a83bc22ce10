"""The autoencoder, and the training pictures as it encodes them."""

import time
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from rich.progress import Progress
from torch.nn.functional import l1_loss, mse_loss
from transformers import CLIPTokenizer

from asyncdiff.demo.networks import build_autoencoder
from asyncdiff.demo.pictures import crop_batch, picture_batch, picture_captions
from asyncdiff.demo.training.loop import TrainingLog, reported_steps, update, warmup_and_cosine
from asyncdiff.demo.training.settings import TrainingSettings
from asyncdiff.demo.vocabulary import caption_tokens

_ENCODING_BATCH = 128  # pictures
# Weighed against the mean absolute error of a channel in -1..1. Enough to keep the latents near a normal
# distribution and the decoder tolerant of small errors in them.
_KL_WEIGHT = 5e-4


@dataclass(frozen=True)
class LatentDataset:
    """The training pictures as denoisers see them: scaled latents as mean and deviation, and caption tokens.

    `mean` and `deviation` are float32 (pictures, 4, 8, 8), `tokens` is int64 (pictures, 32).
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    tokens: torch.Tensor


def train_autoencoder(settings: TrainingSettings, log: TrainingLog, progress: Progress) -> AutoencoderKL:
    """Trains the autoencoder, most of the time on crops, and measures its `scaling_factor`."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    # Channels last saves a fifth of a step's time here; it made no difference for the U-Net.
    vae = build_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), settings.autoencoder_rate, betas=(0.9, 0.99), fused=True)
    steps = settings.crop_steps + settings.autoencoder_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_cosine(steps))
    for step in reported_steps("autoencoder", steps, log, progress):
        first = step.index * settings.autoencoder_batch
        draw_batch = crop_batch if step.index < settings.crop_steps else picture_batch
        numbers = [(first + place) % settings.pictures for place in range(settings.autoencoder_batch)]
        pictures = draw_batch(settings.seed, numbers)
        posterior = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        divergence = posterior.kl().sum() / posterior.mean.numel()
        loss = l1_loss(decoded, pictures) + 3 * mse_loss(decoded, pictures) + _KL_WEIGHT * divergence
        update(loss, list(vae.parameters()), optimizer, schedule)
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
    return LatentDataset(torch.cat(means), torch.cat(deviations), caption_tokens(tokenizer, captions))

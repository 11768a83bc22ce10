"""Training a denoiser together with its text encoders, whichever they are."""

from collections.abc import Iterator
from typing import Protocol

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.training_utils import EMAModel
from rich.progress import Progress
from torch import nn
from transformers import CLIPTokenizer

from asyncdiff.demo.training.autoencoder import LatentDataset
from asyncdiff.demo.training.loop import TrainingLog, epochs, reported_steps, update, warmup_and_cosine
from asyncdiff.demo.training.settings import TrainingSettings
from asyncdiff.demo.training.transformer import TransformerNetworks
from asyncdiff.demo.training.unet import UNetNetworks
from asyncdiff.demo.vocabulary import caption_tokens


class Networks(Protocol):
    """The networks of one bundled model, with random weights at first."""

    def modules(self) -> list[nn.Module]:
        """Those that are trained together: text encoders, then the denoiser."""

    def loss(
        self, latents: torch.Tensor, noise: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """How far the prediction is off for each (batch, 4, 8, 8) of scaled latents and standard noise, mixed
        as at the `places` in [0, 1) of the noise schedule, with (batch, 32) caption tokens: a scalar."""

    def pipeline(self, vae: AutoencoderKL) -> DiffusionPipeline:
        """A pipeline of these networks themselves, no longer in training mode."""


def build_networks(model: str, tokenizer: CLIPTokenizer) -> Networks:
    """The networks of a model of `asyncdiff.demo.DEMO_MODELS`."""
    return UNetNetworks(tokenizer) if model == "unet" else TransformerNetworks(tokenizer)


class DenoiserTraining:
    """Text encoders and denoiser, trained together, and a moving average of their weights."""

    def __init__(self, settings: TrainingSettings, tokenizer: CLIPTokenizer) -> None:
        torch.manual_seed(settings.seed + 2)
        self.settings = settings
        self.tokenizer = tokenizer
        self.networks = build_networks(settings.model, tokenizer)
        self._parameters = _parameters(self.networks)
        self._average = EMAModel(self._parameters, decay=settings.ema_decay, foreach=True)

    def steps(self, dataset: LatentDataset, log: TrainingLog, progress: Progress) -> Iterator[int]:
        """Trains, and yields the number of steps done after each of them."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed + 3)
        optimizer = torch.optim.AdamW(self._parameters, settings.denoiser_rate, betas=(0.9, 0.99), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_cosine(settings.denoiser_steps))
        batches = epochs(len(dataset.mean), settings.denoiser_batch, generator)
        for module in self.networks.modules():
            module.train()
        for step in reported_steps(settings.model, settings.denoiser_steps, log, progress):
            loss = self._loss(dataset, next(batches), generator)
            update(loss, self._parameters, optimizer, schedule)
            self._average.step(self._parameters)
            step.loss = loss.item()
            yield step.index + 1

    @torch.no_grad()
    def averaged_pipeline(self, vae: AutoencoderKL) -> DiffusionPipeline:
        """A pipeline with copies of the averaged weights."""
        networks = build_networks(self.settings.model, self.tokenizer)
        self._average.copy_to(_parameters(networks))
        return networks.pipeline(vae)

    def _loss(self, dataset: LatentDataset, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        mean, deviation = dataset.mean[batch], dataset.deviation[batch]
        latents = mean + deviation * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        places = _stratified(len(batch), generator)
        tokens = self._without_some_captions(dataset.tokens[batch], generator)
        return self.networks.loss(latents, noise, places, tokens)

    def _without_some_captions(self, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Some captions made empty, for classifier-free guidance (Ho and Salimans 2022)."""
        empty = caption_tokens(self.tokenizer, [""])
        is_dropped = torch.rand(len(tokens), 1, generator=generator) < self.settings.caption_dropout
        return torch.where(is_dropped, empty, tokens)


def _stratified(count: int, generator: torch.Generator) -> torch.Tensor:
    """A place from each of `count` equal stretches of [0, 1): the loss varies less than with free draws."""
    return (torch.arange(count) + torch.rand(count, generator=generator)) / count


def _parameters(networks: Networks) -> list[nn.Parameter]:
    return [parameter for module in networks.modules() for parameter in module.parameters()]

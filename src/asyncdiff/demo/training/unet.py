"""The networks of the first bundled model under training: a text encoder and a U-Net."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from torch import nn
from torch.nn.functional import mse_loss
from transformers import CLIPTokenizer

from asyncdiff.demo.networks import build_noise_scheduler, build_text_encoder, build_unet


class UNetNetworks:
    """Learns the velocity (Salimans and Ho 2022) at whole timesteps."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = build_text_encoder(tokenizer)
        self.unet = build_unet()
        self.noise_scheduler = build_noise_scheduler()

    def modules(self) -> list[nn.Module]:
        return [self.text_encoder, self.unet]

    def loss(
        self, latents: torch.Tensor, noise: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        timesteps = (places * self.noise_scheduler.config.num_train_timesteps).long()
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        target = self.noise_scheduler.get_velocity(latents, noise, timesteps)
        states = self.text_encoder(tokens).last_hidden_state
        return mse_loss(self.unet(noisy, timesteps, states).sample, target)

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.text_encoder.eval(),
            tokenizer=self.tokenizer,
            unet=self.unet.eval(),
            scheduler=DDIMScheduler.from_config(self.noise_scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

"""The networks of the second bundled model under training: two text encoders and a transformer."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import nn
from torch.nn.functional import mse_loss
from transformers import CLIPTokenizer

from asyncdiff.demo import DEMO_MODELS
from asyncdiff.demo.networks import build_flow_scheduler, build_projecting_text_encoder, build_transformer

# The tokens that stand where Stable Diffusion 3 has those of a T5 encoder, which this model has not.
_ABSENT_TOKENS: int = DEMO_MODELS["transformer"].call_arguments["max_sequence_length"]


class TransformerNetworks:
    """Learns the flow from latents to noise along straight lines (Liu et al. 2022; Esser et al. 2024).

    The noise levels it learns are those the noise scheduler passes through, so its shift decides how often
    each is seen in training and in sampling alike.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = build_projecting_text_encoder(tokenizer)
        self.text_encoder_2 = build_projecting_text_encoder(tokenizer)
        self.transformer = build_transformer()
        self.noise_scheduler = build_flow_scheduler()

    def modules(self) -> list[nn.Module]:
        return [self.text_encoder, self.text_encoder_2, self.transformer]

    def loss(
        self, latents: torch.Tensor, noise: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        index = (places * self.noise_scheduler.config.num_train_timesteps).long()
        sigmas = self.noise_scheduler.sigmas[index].view(-1, 1, 1, 1)
        noisy = (1 - sigmas) * latents + sigmas * noise
        states, pooled = self.encode(tokens)
        flow = self.transformer(noisy, states, pooled, self.noise_scheduler.timesteps[index]).sample
        return mse_loss(flow, noise - latents)

    def encode(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the pipeline's `encode_prompt` makes of captions: (captions, 33, 128) and (captions, 128)."""
        encoders = (self.text_encoder, self.text_encoder_2)
        encoded = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
        words = torch.cat([each.hidden_states[-2] for each in encoded], dim=-1)
        absent = words.new_zeros(len(words), _ABSENT_TOKENS, words.shape[-1])
        return torch.cat([words, absent], dim=1), torch.cat([each.text_embeds for each in encoded], dim=-1)

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
        # Stable Diffusion 3 shifts its latents before it scales them; the U-Net's autoencoder knows no shift.
        vae.register_to_config(shift_factor=0.0)
        return StableDiffusion3Pipeline(
            vae=vae,
            text_encoder=self.text_encoder.eval(),
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2.eval(),
            tokenizer_2=self.tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
            transformer=self.transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(self.noise_scheduler.config),
        )

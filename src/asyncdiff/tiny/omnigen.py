"""OmniGen: prompts are sentences, which its processor turns into ids, positions and masks."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    OmniGenPipeline,
    OmniGenTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator, OmniGenMultiModalProcessor

from asyncdiff.tiny.parts import autoencoder, quiet, random_weights
from asyncdiff.tiny.stand_in import TinyCall, TinyPipeline
from asyncdiff.tiny.text import prompts, t5


class _TextProcessor(OmniGenMultiModalProcessor):
    """Without the transforms for input pictures, the only thing for which OmniGen needs torchvision."""

    def __init__(self, tokenizer: Any) -> None:
        self.text_tokenizer = tokenizer
        self.max_image_size = 1024
        self.collator = OmniGenCollator()


class _TextToImage(OmniGenPipeline):
    """OmniGenPipeline for prompts without input pictures; the sizes are those of its own constructor."""

    def __init__(self, transformer: Any, scheduler: Any, vae: Any, tokenizer: Any) -> None:
        DiffusionPipeline.__init__(self)
        self.register_modules(vae=vae, tokenizer=tokenizer, transformer=transformer, scheduler=scheduler)
        self.vae_scale_factor = 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=16)
        self.multimodal_processor = _TextProcessor(tokenizer)
        self.default_sample_size = 128


def _omnigen() -> OmniGenPipeline:
    _, tokenizer = t5()
    transformer = random_weights(
        lambda: OmniGenTransformer2DModel(
            in_channels=4,
            patch_size=2,
            hidden_size=16,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=24,
            num_layers=4,
            pad_token_id=0,
            vocab_size=len(tokenizer),
            time_step_dim=8,
            rope_scaling={"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
            pos_embed_max_size=16,
        )
    )
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1)
    return quiet(_TextToImage(transformer, scheduler, autoencoder(levels=4), tokenizer))


def _arguments(call: TinyCall) -> dict[str, Any]:
    side = 128 if call.large else 64
    return {
        "prompt": prompts(call), "num_inference_steps": call.steps, "height": side, "width": side,
        "guidance_scale": 2.5, "generator": call.generator(), "output_type": "latent",
    }  # fmt: skip


FAMILIES = (TinyPipeline("omnigen", _omnigen, _arguments),)

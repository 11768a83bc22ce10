"""The demo pipelines' networks before training: Stable Diffusion 1.5's and 3.5's structure, far smaller."""

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
)

from asyncdiff.demo.drawing import PICTURE_SIZE

LATENT_SIZE = 8  # latent pixels, width and height: one eighth of the picture's, as in Stable Diffusion
LATENT_CHANNELS = 4
TEXT_WIDTH = 128  # what the denoisers read; the transformer half of it from each of two text encoders

# How much of the usual random start is added to the copying one, so that channels are not all alike.
_COPY_NOISE = 0.3


def build_autoencoder() -> AutoencoderKL:
    """64x64 pictures to 8x8 latents of 4 channels and back, one million parameters.

    It starts close to copying colours: see `_start_as_a_copy`.
    """
    vae = AutoencoderKL(
        sample_size=PICTURE_SIZE,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
    )
    _start_as_a_copy(vae)
    return vae


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text encoder for the tokenizer's vocabulary and length."""
    encoder = CLIPTextModel(_text_config(tokenizer, TEXT_WIDTH, layers=2))
    _enlarge_embeddings(encoder)
    return encoder


def build_projecting_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """One of the transformer's two text encoders, half as wide as the U-Net's.

    Of its three layers, the last serves the projected end of the caption only: the states of single words are
    read before it, as Stable Diffusion 3 does.
    """
    encoder = CLIPTextModelWithProjection(_text_config(tokenizer, TEXT_WIDTH // 2, layers=3))
    _enlarge_embeddings(encoder)
    return encoder


def build_unet() -> UNet2DConditionModel:
    """7 million parameters on 8x8, 4x4 and 2x2 latent pixels, with cross attention on the first two levels.

    On 16x16 latents, with an autoencoder that halves the picture twice instead of three times, a step of its
    training took 1.9 s instead of 0.42 s (64 pictures, two CPU cores, first level 64 wide).

    Besides cross attention, the caption scales and shifts the normalised activations, together with the
    timestep, as in DeepFloyd IF.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # the number of heads, despite its name
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    )


def build_noise_scheduler() -> DDIMScheduler:
    """The linear noise schedule of Ho et al. 2020, with v-prediction (Salimans and Ho 2022).

    Stable Diffusion's schedule is too mild for latents of 8x8 pixels: an observer who knows all but the
    object's position reads it from the noisy latents in 97 % of cases at timestep 500 and in 72 % at 700
    (71 % and 23 % with this one). So a caption's position was hardly worth learning, and after 2000 steps
    it was not learned.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def build_transformer() -> SD3Transformer2DModel:
    """5 million parameters on 64 latent pixels, each a token of its own, beside the caption's tokens.

    Eight layers, enough for four stages, with normalised queries and keys as in Stable Diffusion 3.5. Its
    position embeddings are laid out for 8x8 tokens and no more.
    """
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        pos_embed_max_size=LATENT_SIZE,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=8,
        num_attention_heads=4,
        attention_head_dim=32,
        caption_projection_dim=128,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        qk_norm="rms_norm",
    )
    _start_as_no_change(transformer)
    return transformer


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow (Liu et al. 2022), as Stable Diffusion 3 samples it: Euler steps, shifted by 3.

    The shift decides how many steps are spent where noise hides an object's position (see
    `build_noise_scheduler`). By three, noise outweighs the latents three to one in half of the steps, and one
    to one in three quarters: almost the shares of the U-Net's linear noise schedule.
    """
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _enlarge_embeddings(encoder: PreTrainedModel) -> None:
    """Makes token embeddings start fifty times larger than CLIP's, as large as what the layers add to them.

    From CLIP's start, words that earn nothing in the first steps (the positions) were drowned by those that
    do, and after 1000 steps had not been learned; from this one, after 400.
    """
    nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0)


def _start_as_a_copy(vae: AutoencoderKL) -> None:
    """Makes the autoencoder start close to passing a thinned-out picture through its first channels.

    From diffusers' random start it learned brightness first and colours long after: after 200 steps on crops
    the mean squared error was 0.12, and 0.05 from this start.
    """
    blocks = [module for module in vae.modules() if isinstance(module, ResnetBlock2D)]
    for block in blocks:
        nn.init.zeros_(block.conv2.weight)
    for attention in (vae.encoder.mid_block.attentions[0], vae.decoder.mid_block.attentions[0]):
        nn.init.zeros_(attention.to_out[0].weight)
    inner = {id(conv) for block in blocks for conv in (block.conv1, block.conv2)}
    for module in vae.modules():
        if isinstance(module, nn.Conv2d) and id(module) not in inner:
            noise = _COPY_NOISE * module.weight.detach()
            nn.init.dirac_(module.weight)
            module.weight.data += noise


def _start_as_no_change(transformer: SD3Transformer2DModel) -> None:
    """Makes every block pass its input on at first, and the prediction zero (adaLN-Zero).

    Peebles and Xie 2023, section 3.2. diffusers leaves the start to whoever trains.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    gates = (AdaLayerNormZero, AdaLayerNormContinuous)
    modulations = [module.linear for module in transformer.modules() if isinstance(module, gates)]
    for layer in (*modulations, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)

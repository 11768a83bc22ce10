"""Text and image encoders with random weights, and their tokenizers: prompts are real strings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from asyncdiff.demo.captions import DEMO_CAPTIONS, scene_of
from asyncdiff.demo.drawing import draw
from asyncdiff.demo.vocabulary import build_tokenizer, grammar_words
from asyncdiff.tiny.parts import random_weights
from asyncdiff.tiny.stand_in import TinyCall

CLIP_WIDTH = 8
T5_WIDTH = 16


def prompts(call: TinyCall) -> list[str]:
    """One caption for each picture of the batch; another seed, other captions."""
    return [DEMO_CAPTIONS[(call.seed + i) % len(DEMO_CAPTIONS)] for i in range(call.batch)]


def pictures(call: TinyCall, side: int) -> list[Image.Image]:
    """What the prompts say, drawn: RGB pictures of `side` pixels."""
    return [draw(scene_of(prompt)).resize((side, side)) for prompt in prompts(call)]


def clip(
    *, projection: bool = False, seed: int = 10
) -> tuple[CLIPTextModel | CLIPTextModelWithProjection, CLIPTokenizer]:
    """A CLIP text encoder of two layers, and a tokenizer that knows the words of the demo's captions."""
    tokenizer = build_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=CLIP_WIDTH, intermediate_size=2 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return _text_encoder(lambda: kind(config), seed), tokenizer


def t5(*, seed: int = 12) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 encoder of one layer; its tokenizer knows the captions' words and spells out all others."""
    tokenizer = T5Tokenizer(vocab=_unigrams(), extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=8, d_ff=2 * T5_WIDTH, num_layers=1, num_heads=2,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return _text_encoder(lambda: T5EncoderModel(config), seed), tokenizer


def clip_vision(*, seed: int = 13) -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessorPil]:
    """A CLIP image encoder for pictures of 224 pixels, four patches to a picture, and what prepares them."""
    config = CLIPVisionConfig(
        image_size=224, patch_size=112, hidden_size=CLIP_WIDTH, intermediate_size=2 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    return random_weights(lambda: CLIPVisionModelWithProjection(config), seed), CLIPImageProcessorPil()


def _text_encoder(build: Callable[[], Any], seed: int) -> Any:
    """Its token embeddings are large enough that every word matters, which those of a usual start are not."""
    encoder = random_weights(build, seed)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0, generator=generator)
    return encoder


def _unigrams() -> list[tuple[str, float]]:
    """Pieces and their log probabilities: words are likelier than the letters that they are made of."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -5.0) for word in grammar_words()]
    letters = [(piece, -10.0) for piece in ("▁", *map(chr, range(ord("!"), ord("~") + 1)))]
    known = {piece for piece, _ in words}
    return special + words + [(piece, score) for piece, score in letters if piece not in known]

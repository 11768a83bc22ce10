"""The demo's tokenizer: CLIP's format, with merges that make every word of the caption grammar one token."""

import re
from collections import Counter
from itertools import pairwise

import torch
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from asyncdiff.demo.captions import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES

START = "<|startoftext|>"
END = "<|endoftext|>"
MAX_TOKENS = 32  # the longest caption has 23, start and end included

_END_OF_WORD = "</w>"
_Merge = tuple[str, str]


def grammar_words() -> list[str]:
    """Every word that can occur in a caption, in alphabetical order."""
    kinds = (SHAPES, COLOURS, SIZES, BACKGROUNDS, POSITIONS, ("a and at in on the background",))
    return sorted({word for kind in kinds for phrase in kind for word in phrase.split()})


def build_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer for the grammar; any other text is spelled out in single bytes."""
    merges = word_merges(grammar_words())
    alphabet = list(bytes_to_unicode().values())
    tokens = alphabet + [letter + _END_OF_WORD for letter in alphabet] + ["".join(merge) for merge in merges]
    vocabulary = {token: index for index, token in enumerate([*tokens, START, END])}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=MAX_TOKENS,
    )


def caption_tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Captions as the pipelines tokenise them: int64 (captions, 32), padded at the end."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def word_merges(words: list[str]) -> list[_Merge]:
    """Byte-pair merges after which every word is a single token (Sennrich et al. 2016, section 3.2).

    The most frequent pair is merged first, ties in alphabetical order. (`tokenizers.trainers.BpeTrainer`
    breaks ties differently from run to run, so that a training could not be repeated.)
    """
    spellings = [(*word[:-1], word[-1] + _END_OF_WORD) for word in words]
    merges = []
    while any(len(spelling) > 1 for spelling in spellings):
        counts = Counter(pair for spelling in spellings for pair in pairwise(spelling))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spellings = [_merged(spelling, best) for spelling in spellings]
    return merges


def _merged(spelling: tuple[str, ...], pair: _Merge) -> tuple[str, ...]:
    joined = re.sub(
        rf"(?<!\S){re.escape(pair[0])} {re.escape(pair[1])}(?!\S)", "".join(pair), " ".join(spelling)
    )
    return tuple(joined.split(" "))

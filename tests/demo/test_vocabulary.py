"""The tokenizer: one token per word of the grammar, CLIP's format, the same every time it is built."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from asyncdiff.demo.captions import caption_of, sample_scene
from asyncdiff.demo.vocabulary import MAX_TOKENS, build_tokenizer, grammar_words

_TOKENIZER = build_tokenizer()


@given(st.integers())
def test_every_word_of_a_caption_is_one_token(seed: int) -> None:
    caption = caption_of(sample_scene(Random(seed)))
    tokens = _TOKENIZER.tokenize(caption)
    assert tokens == [f"{word}</w>" for word in caption.split()]
    assert len(_TOKENIZER(caption).input_ids) == len(tokens) + 2 <= MAX_TOKENS


def test_captions_start_and_end_as_clip_expects() -> None:
    ids = _TOKENIZER("a ring", padding="max_length").input_ids
    assert len(ids) == MAX_TOKENS
    assert ids[0] == _TOKENIZER.bos_token_id == len(_TOKENIZER) - 2
    assert set(ids[3:]) == {_TOKENIZER.eos_token_id} == {len(_TOKENIZER) - 1}


def test_words_outside_the_grammar_are_spelled_out() -> None:
    tokens = _TOKENIZER.tokenize("a zebra: 7 é")
    assert "".join(tokens).replace("</w>", " ").startswith("a zebra")
    assert _TOKENIZER.unk_token_id not in _TOKENIZER.convert_tokens_to_ids(tokens)


def test_building_it_again_gives_the_same_vocabulary() -> None:
    assert build_tokenizer().get_vocab() == _TOKENIZER.get_vocab()


def test_grammar_words_are_single_words() -> None:
    words = grammar_words()
    assert words == sorted(set(words))
    assert all(word.isalpha() and word.islower() for word in words)

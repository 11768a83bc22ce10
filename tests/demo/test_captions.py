"""The caption grammar: captions and scenes say the same, and held-out captions stay out of training."""

import re
import subprocess
import sys
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdiff.demo import DEMO_CAPTIONS, held_out_captions
from asyncdiff.demo.captions import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption_of,
    is_held_out,
    sample_scene,
    sample_training_scene,
    scene_of,
    single_scenes,
)

# A reading of the grammar by eye: words in fixed places, not the library's own pattern.
_WORDS_OF_ONE_THING = re.compile(r"a (\w+) (\w+) (\w+) (at|in) the (.+)")


def test_every_caption_with_one_object_round_trips() -> None:
    scenes = list(single_scenes())
    captions = {caption_of(scene) for scene in scenes}
    assert len(scenes) == len(captions) == len(SIZES) * len(COLOURS) * len(SHAPES) * len(POSITIONS) * 4
    assert all(scene_of(caption_of(scene)) == scene for scene in scenes)


@given(st.integers())
def test_sampled_scenes_round_trip(seed: int) -> None:
    scene = sample_scene(Random(seed))
    assert scene_of(caption_of(scene)) == scene


@given(st.integers())
def test_caption_names_every_word_of_its_scene(seed: int) -> None:
    scene = sample_scene(Random(seed))
    things, background = caption_of(scene).removesuffix(" background").rsplit(" on a ", 1)
    assert background == scene.background
    for phrase, thing in zip(things.split(" and "), scene.things, strict=True):
        match = _WORDS_OF_ONE_THING.fullmatch(phrase)
        assert match is not None
        assert match.group(1, 2, 3, 5) == (thing.size, thing.colour, thing.shape, thing.position)


def test_caption_reads_as_documented() -> None:
    left, right = Thing("large", "red", "circle", "left"), Thing("small", "blue", "star", "right")
    assert caption_of(Scene((left, right), "white")) == (
        "a large red circle at the left and a small blue star at the right on a white background"
    )
    assert caption_of(Scene((Thing("small", "pink", "ring", "middle"),), "black")) == (
        "a small pink ring in the middle on a black background"
    )


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle",
        "a large red circle at the middle on a white background",
        "a large red circle at the left on a white background ",
        "a large red circle at the left on a mauve background",
        "a large red circle at the left and a small red star at the right on a white background",
        "a large red circle at the left and a small blue star at the top left on a white background",
    ],
)
def test_other_texts_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match=r"not a caption|cannot share"):
        scene_of(caption)


def test_words_outside_the_grammar_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"colour='mauve' .* red"):
        Thing("large", "mauve", "circle", "left")
    with pytest.raises(ValueError, match="one or two objects, but 0"):
        Scene((), "white")


def test_training_scenes_are_never_held_out() -> None:
    rng = Random(0)
    assert not any(is_held_out(caption_of(sample_training_scene(rng))) for _ in range(5000))


def test_training_scenes_are_not_in_a_long_held_out_list() -> None:
    rng = Random(1)
    trained = {caption_of(sample_training_scene(rng)) for _ in range(5000)}
    assert trained.isdisjoint(held_out_captions(2000))


def test_held_out_captions_are_different_and_of_both_kinds() -> None:
    captions = held_out_captions(400)
    assert len(set(captions)) == 400
    assert all(is_held_out(caption) for caption in captions)
    assert {len(scene_of(caption).things) for caption in captions} == {1, 2}


def test_one_caption_with_one_object_in_twenty_is_held_out() -> None:
    held_out = sum(is_held_out(caption_of(scene)) for scene in single_scenes())
    assert held_out == 205  # of 4032, a constant of the grammar: another number means another split


@given(st.integers(0, 100), st.integers(0, 100), st.integers())
def test_shorter_held_out_list_is_the_start_of_a_longer_one(short: int, longer_by: int, seed: int) -> None:
    assert held_out_captions(short + longer_by, seed)[:short] == held_out_captions(short, seed)


def test_held_out_captions_depend_on_the_seed() -> None:
    assert held_out_captions(20, seed=0) != held_out_captions(20, seed=1)


@pytest.mark.parametrize("count", [-1, 10_001])
def test_impossible_held_out_counts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"count={count}.*0\.\.10000"):
        held_out_captions(count)


def test_demo_captions_are_held_out_and_show_the_whole_palette() -> None:
    scenes = [scene_of(caption) for caption in DEMO_CAPTIONS]
    assert len(set(DEMO_CAPTIONS)) == 16
    assert all(is_held_out(caption) for caption in DEMO_CAPTIONS)
    assert {thing.shape for scene in scenes for thing in scene.things} == set(SHAPES)
    assert {thing.colour for scene in scenes for thing in scene.things} == set(COLOURS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)


@pytest.mark.timeout(60)
def test_importing_the_demo_package_does_not_import_torch() -> None:
    code = "import sys, asyncdiff.demo; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=50).returncode == 0

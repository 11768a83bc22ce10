"""Drawings: the same for the same seed, with the caption's colour at the caption's position."""

import math
from random import Random

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from asyncdiff.demo.captions import POSITIONS, SHAPES, Scene, Thing, sample_scene, single_scenes
from asyncdiff.demo.drawing import BACKGROUND_RGB, GRID, OBJECT_RGB, PICTURE_SIZE, RADIUS, draw

# Shades vary by 5 % of a channel, so by at most 13 of 255 in each of three channels.
_SHADE_DISTANCE = 13 * math.sqrt(3)


def _distance(pixel: tuple[int, ...], rgb: tuple[int, int, int]) -> float:
    return math.dist(pixel[:3], rgb)


def _pixel_on(thing: Thing) -> tuple[int, int]:
    """A pixel that the object covers whatever its jitter: its middle, or a point of the ring's band."""
    column, row = POSITIONS[thing.position]
    offset = 0.73 * RADIUS[thing.size] if thing.shape == "ring" else 0.0
    return round(GRID[column] + offset), round(GRID[row])


def _pixels(picture: Image.Image) -> numpy.ndarray:
    return numpy.asarray(picture)


def _object_pixels(scene: Scene) -> int:
    background = BACKGROUND_RGB[scene.background]
    return int((numpy.abs(_pixels(draw(scene)).astype(int) - background).sum(-1) > 60).sum())


def test_every_single_scene_shows_its_colour_at_its_position() -> None:
    for scene in single_scenes():
        (thing,) = scene.things
        picture = draw(scene)
        assert picture.size == (PICTURE_SIZE, PICTURE_SIZE)
        assert picture.mode == "RGB"
        assert picture.getpixel(_pixel_on(thing)) == OBJECT_RGB[thing.colour], scene


@settings(max_examples=200, deadline=None)
@given(st.integers(), st.integers())
def test_jittered_scenes_show_their_colours_and_background(scene_seed: int, drawing_seed: int) -> None:
    scene = sample_scene(Random(scene_seed))
    picture = draw(scene, drawing_seed)
    for thing in scene.things:
        if thing.shape != "ring":  # the small ring's band is narrower than the jitter
            assert _distance(picture.getpixel(_pixel_on(thing)), OBJECT_RGB[thing.colour]) <= _SHADE_DISTANCE
    middle_of_the_edge = picture.getpixel((0, 24))
    assert _distance(middle_of_the_edge, BACKGROUND_RGB[scene.background]) <= _SHADE_DISTANCE


def test_same_seed_draws_the_same_picture() -> None:
    scene = sample_scene(Random(3))
    assert draw(scene, 5).tobytes() == draw(scene, 5).tobytes()
    assert draw(scene).tobytes() == draw(scene).tobytes()


def test_another_seed_draws_another_picture() -> None:
    scene = sample_scene(Random(3))
    assert len({draw(scene, seed).tobytes() for seed in range(20)}) == 20


@pytest.mark.parametrize("shape", SHAPES)
def test_large_objects_cover_more_than_twice_the_small_ones(shape: str) -> None:
    small = _object_pixels(Scene((Thing("small", "blue", shape, "middle"),), "white"))
    large = _object_pixels(Scene((Thing("large", "blue", shape, "middle"),), "white"))
    assert large > 2 * small > 60


def test_shapes_differ_from_one_another() -> None:
    pictures = [
        _pixels(draw(Scene((Thing("large", "blue", s, "middle"),), "white"))).astype(int) for s in SHAPES
    ]
    for index, first in enumerate(pictures):
        for second in pictures[index + 1 :]:
            changed = (numpy.abs(first - second).sum(-1) > 60).sum()
            assert changed >= 40  # pixels of about 400 that a large shape covers


def test_edges_are_smooth() -> None:
    colours = _pixels(draw(Scene((Thing("large", "blue", "circle", "middle"),), "white"))).reshape(-1, 3)
    assert len(numpy.unique(colours, axis=0)) > 8  # two without averaging

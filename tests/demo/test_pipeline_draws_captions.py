"""The bundled pipelines draw what held-out captions say: the right colour at the right place."""

import math
from collections import Counter

import numpy
import pytest
import torch
from PIL import Image

from asyncdiff.demo import DEMO_MODELS, held_out_captions, load_demo_pipeline
from asyncdiff.demo.captions import POSITIONS, Scene, scene_of
from asyncdiff.demo.drawing import BACKGROUND_RGB, GRID, OBJECT_RGB

_CELL = 9  # pixels from a grid point to the edges of the square looked at
_MIN_OBJECT_DISTANCE = 70.0  # of a pixel from the background's colour, to count as part of an object
_MIN_OBJECT_PIXELS = 25  # the smallest object, a small ring, covers about 110
_PICTURES = 16
_MIN_RIGHT = 13  # of 16, just above 80 %


def _single_object_scenes(count: int) -> dict[str, Scene]:
    scenes = {caption: scene_of(caption) for caption in held_out_captions(200)}
    singles = {caption: scene for caption, scene in scenes.items() if len(scene.things) == 1}
    return dict(list(singles.items())[:count])


def _object_colour(picture: Image.Image, position: str, background: str) -> str | None:
    """The colour nearest to most pixels around a position, background aside; None where nothing is drawn."""
    column, row = POSITIONS[position]
    x, y = int(GRID[column]), int(GRID[row])
    cell = numpy.asarray(picture)[y - _CELL : y + _CELL, x - _CELL : x + _CELL].reshape(-1, 3).tolist()
    drawn = [pixel for pixel in cell if math.dist(pixel, BACKGROUND_RGB[background]) > _MIN_OBJECT_DISTANCE]
    nearest = Counter(min(OBJECT_RGB, key=lambda name: math.dist(pixel, OBJECT_RGB[name])) for pixel in drawn)
    return nearest.most_common(1)[0][0] if len(drawn) >= _MIN_OBJECT_PIXELS else None


def _background(picture: Image.Image) -> str:
    """The background colour nearest to the median of the picture's outermost pixels."""
    pixels = numpy.asarray(picture)
    edge = numpy.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return min(BACKGROUND_RGB, key=lambda name: math.dist(numpy.median(edge, axis=0), BACKGROUND_RGB[name]))


@pytest.fixture(scope="module", params=DEMO_MODELS)
def drawn(request: pytest.FixtureRequest) -> list[tuple[Scene, Image.Image]]:
    scenes = _single_object_scenes(_PICTURES)
    model = DEMO_MODELS[request.param]
    pipe = load_demo_pipeline(model=model.name)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(scenes))]
    pictures = pipe(
        list(scenes),
        num_inference_steps=20,
        guidance_scale=model.guidance_scale,
        generator=generators,
        **model.call_arguments,
    ).images
    return list(zip(scenes.values(), pictures, strict=True))


def test_objects_have_the_captions_colour_at_its_position(drawn: list[tuple[Scene, Image.Image]]) -> None:
    seen = [_object_colour(picture, scene.things[0].position, scene.background) for scene, picture in drawn]
    said = [scene.things[0].colour for scene, _ in drawn]
    assert sum(a == b for a, b in zip(seen, said, strict=True)) >= _MIN_RIGHT, (said, seen)


def test_backgrounds_have_the_captions_colour(drawn: list[tuple[Scene, Image.Image]]) -> None:
    seen = [_background(picture) for _, picture in drawn]
    said = [scene.background for scene, _ in drawn]
    assert sum(a == b for a, b in zip(seen, said, strict=True)) >= _MIN_RIGHT, (said, seen)


def test_other_positions_are_empty(drawn: list[tuple[Scene, Image.Image]]) -> None:
    # Cells two steps away from the object; next to a large one its edge may show.
    empty = 0
    for scene, picture in drawn:
        column, row = POSITIONS[scene.things[0].position]
        far = [p for p, (c, r) in POSITIONS.items() if max(abs(c - column), abs(r - row)) == 2]
        empty += all(_object_colour(picture, position, scene.background) is None for position in far)
    assert empty >= _MIN_RIGHT

"""Draws a `Scene` as a small RGB picture: what the demo pipeline learns."""

import math
from random import Random

from PIL import Image, ImageDraw

from asyncdiff.demo.captions import POSITIONS, Scene, Thing

PICTURE_SIZE = 64  # pixels, width and height

Rgb = tuple[int, int, int]
Point = tuple[float, float]

OBJECT_RGB: dict[str, Rgb] = {
    "red": (216, 32, 38),
    "orange": (244, 134, 26),
    "yellow": (246, 216, 42),
    "green": (44, 154, 62),
    "teal": (28, 176, 180),
    "blue": (38, 82, 204),
    "purple": (126, 50, 166),
    "pink": (246, 124, 176),
}
BACKGROUND_RGB: dict[str, Rgb] = {
    "white": (246, 246, 246),
    "black": (18, 18, 18),
    "grey": (140, 140, 140),
    "beige": (226, 206, 168),
}
RADIUS = {"small": 7.5, "large": 13.0}  # pixels, of the circle around the object
GRID = (16.0, 32.0, 48.0)  # pixels, centres of the grid's columns and rows

# Drawn this many times larger and then averaged, which makes the edges smooth.
_SUPERSAMPLING = 4


def draw(scene: Scene, seed: int | None = None) -> Image.Image:
    """The scene as a 64x64 RGB picture.

    With a seed, positions, sizes, angles and shades vary a little, always in the same way for the same seed;
    without one, every object stands exactly at its grid point in its exact colour.
    """
    jitter = _Jitter(seed)
    canvas_size = PICTURE_SIZE * _SUPERSAMPLING
    background = jitter.shade(BACKGROUND_RGB[scene.background])
    picture = Image.new("RGB", (canvas_size, canvas_size), background)
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        _draw_thing(pen, thing, background, jitter)
    return picture.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)


class _Jitter:
    """Small seeded variations; none at all without a seed."""

    def __init__(self, seed: int | None) -> None:
        self._rng = None if seed is None else Random(seed)

    def around(self, centre: float, spread: float) -> float:
        """A number within `spread` of `centre`."""
        return centre if self._rng is None else centre + self._rng.uniform(-spread, spread)

    def shade(self, rgb: Rgb) -> Rgb:
        """The colour a little lighter or darker."""
        factor = self.around(1.0, 0.05)
        red, green, blue = (min(255, round(channel * factor)) for channel in rgb)
        return red, green, blue


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, background: Rgb, jitter: _Jitter) -> None:
    column, row = POSITIONS[thing.position]
    centre = (
        jitter.around(GRID[column], 1.5) * _SUPERSAMPLING,
        jitter.around(GRID[row], 1.5) * _SUPERSAMPLING,
    )
    radius = RADIUS[thing.size] * jitter.around(1.0, 0.06) * _SUPERSAMPLING
    angle = jitter.around(0.0, 0.08)
    colour = jitter.shade(OBJECT_RGB[thing.colour])
    if thing.shape == "circle":
        pen.ellipse(_box(centre, 0.92 * radius), fill=colour)
    elif thing.shape == "ring":
        pen.ellipse(_box(centre, 0.96 * radius), fill=colour)
        pen.ellipse(_box(centre, 0.50 * radius), fill=background)
    else:
        pen.polygon([_place(point, centre, radius, angle) for point in _OUTLINES[thing.shape]], fill=colour)


def _box(centre: Point, radius: float) -> tuple[float, float, float, float]:
    x, y = centre
    return x - radius, y - radius, x + radius, y + radius


def _place(point: Point, centre: Point, radius: float, angle: float) -> Point:
    x, y = point
    turned_x = x * math.cos(angle) - y * math.sin(angle)
    turned_y = x * math.sin(angle) + y * math.cos(angle)
    return centre[0] + radius * turned_x, centre[1] + radius * turned_y


def _star() -> list[Point]:
    radii = (1.05, 0.45)
    corners = [(radii[index % 2], math.pi * index / 5 - math.pi / 2) for index in range(10)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in corners]


def _cross(arm: float = 0.32, reach: float = 0.95) -> list[Point]:
    quarter = [(arm, -reach), (arm, -arm), (reach, -arm)]
    outline = list(quarter)
    for _ in range(3):
        quarter = [(-y, x) for x, y in quarter]
        outline += quarter
    return outline


def _heart(corners: int = 48) -> list[Point]:
    """The curve x = 16 sin^3 a, y = 13 cos a - 5 cos 2a - 2 cos 3a - cos 4a, brought to the unit circle."""
    outline = []
    for index in range(corners):
        a = 2 * math.pi * index / corners
        x = 16 * math.sin(a) ** 3
        y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        outline.append((x / 17, (-y - 2.5) / 17))
    return outline


_HALF_SIDE = 0.8
_OUTLINES: dict[str, list[Point]] = {
    "square": [
        (-_HALF_SIDE, -_HALF_SIDE),
        (_HALF_SIDE, -_HALF_SIDE),
        (_HALF_SIDE, _HALF_SIDE),
        (-_HALF_SIDE, _HALF_SIDE),
    ],
    "triangle": [(0.0, -0.95), (0.95, 0.75), (-0.95, 0.75)],
    "star": _star(),
    "cross": _cross(),
    "heart": _heart(),
}

"""The demo's picture language: captions, the scenes they describe, and what is kept out of training.

A caption reads ``a large red circle at the left and a small blue star at the right on a white background``.
Caption and `Scene` carry the same information, so either can be computed from the other.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from random import Random

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart")
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "black", "grey", "beige")

# Column and row of each position in a 3x3 grid, from the top left.
POSITIONS: dict[str, tuple[int, int]] = {
    "top left": (0, 0),
    "top": (1, 0),
    "top right": (2, 0),
    "left": (0, 1),
    "middle": (1, 1),
    "right": (2, 1),
    "bottom left": (0, 2),
    "bottom": (1, 2),
    "bottom right": (2, 2),
}

# Pictures for the demo: held out, one and two objects, every shape, colour and background at least once.
DEMO_CAPTIONS = (
    "a large red heart at the left on a white background",
    "a small yellow star at the left on a black background",
    "a large purple circle in the middle on a white background",
    "a large green triangle at the top right on a beige background",
    "a large blue star at the bottom right on a grey background",
    "a small orange star at the right and a small blue cross at the left on a beige background",
    "a large pink ring at the top and a small blue circle at the bottom on a black background",
    "a large green square at the bottom right and a large teal ring at the top right on a white background",
    "a large orange circle at the right on a white background",
    "a large red square at the top left on a grey background",
    "a small blue cross in the middle on a beige background",
    "a large purple star at the bottom left on a black background",
    "a large pink triangle at the right on a grey background",
    "a large teal heart at the top left on a black background",
    "a large yellow heart at the top right and a large pink heart at the bottom left on a black background",
    "a small blue ring at the left and a small teal square at the bottom right on a black background",
)

# One caption in twenty is never trained on: about 200 with one object and 70 000 with two.
_HELD_OUT_ONE_IN = 20
_HELD_OUT_LIMIT = 10_000
_PAIR_PROBABILITY = 0.4


@dataclass(frozen=True)
class Thing:
    """One object of a scene, each field a word of the grammar."""

    size: str
    colour: str
    shape: str
    position: str

    def __post_init__(self) -> None:
        _check_word("size", self.size, SIZES)
        _check_word("colour", self.colour, COLOURS)
        _check_word("shape", self.shape, SHAPES)
        _check_word("position", self.position, POSITIONS)


@dataclass(frozen=True)
class Scene:
    """One or two objects on a plain background.

    Two objects have different colours and stand two grid cells apart in a row or a column, so that they never
    overlap and a colour names exactly one of them. Raises `ValueError` for any other scene.
    """

    things: tuple[Thing, ...]
    background: str

    def __post_init__(self) -> None:
        _check_word("background", self.background, BACKGROUNDS)
        if not 1 <= len(self.things) <= 2:
            raise ValueError(f"A scene has one or two objects, but {len(self.things)} were given.")
        if len(self.things) == 2 and not _may_stand_together(*self.things):
            raise ValueError(
                f"{self.things[0]} and {self.things[1]} cannot share a scene: two objects need different "
                "colours and positions two grid cells apart, for example 'left' and 'right'."
            )


def caption_of(scene: Scene) -> str:
    """The scene in words."""
    return f"{' and '.join(map(_phrase, scene.things))} on a {scene.background} background"


def scene_of(caption: str) -> Scene:
    """The scene a caption describes; raises `ValueError` where the caption is not of the grammar."""
    match = _CAPTION.fullmatch(caption)
    if match is None:
        raise ValueError(
            f"{caption!r} is not a caption of the demo's grammar. A caption reads "
            "'a large red circle at the left and a small blue star at the right on a white background'."
        )
    things = tuple(Thing(*words) for words in _THING.findall(match["things"]))
    return Scene(things, match["background"])


def single_scenes() -> Iterator[Scene]:
    """All scenes with one object, in the order of the word lists."""
    for size, colour, shape, position, background in product(SIZES, COLOURS, SHAPES, POSITIONS, BACKGROUNDS):
        yield Scene((Thing(size, colour, shape, position),), background)


def sample_scene(rng: Random) -> Scene:
    """A random scene: with two objects in four cases of ten, all words of a kind equally likely."""
    background = rng.choice(BACKGROUNDS)
    first = _sample_thing(rng)
    if rng.random() >= _PAIR_PROBABILITY:
        return Scene((first,), background)
    if first.position == "middle":  # nothing is two cells away from the middle
        first = Thing(first.size, first.colour, first.shape, "left")
    second = _sample_thing(rng)
    while not _may_stand_together(first, second):
        second = _sample_thing(rng)
    return Scene((first, second), background)


def is_held_out(caption: str) -> bool:
    """Whether a caption is kept out of training: a fixed function of its text, the same on every machine."""
    digest = hashlib.sha256(caption.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def sample_training_scene(rng: Random) -> Scene:
    """A random scene whose caption is not held out."""
    scene = sample_scene(rng)
    while is_held_out(caption_of(scene)):
        scene = sample_scene(rng)
    return scene


def held_out_captions(count: int, seed: int = 0) -> list[str]:
    """`count` different captions the demo models were not trained on, in an order fixed by `seed`.

    The first captions of a longer list are those of a shorter one with the same seed. Raises `ValueError` for
    more than 10 000.
    """
    if not 0 <= count <= _HELD_OUT_LIMIT:
        raise ValueError(
            f"count={count} held-out captions were asked for, but it must lie in 0..{_HELD_OUT_LIMIT}."
        )
    rng = Random(seed)
    captions: dict[str, None] = {}
    while len(captions) < count:
        caption = caption_of(sample_scene(rng))
        if is_held_out(caption):
            captions[caption] = None
    return list(captions)


def _check_word(kind: str, word: str, known: tuple[str, ...] | dict[str, tuple[int, int]]) -> None:
    if word not in known:
        raise ValueError(
            f"{kind}={word!r} is not a word of the demo's grammar. Use one of: {', '.join(known)}."
        )


def _phrase(thing: Thing) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape} {_preposition(thing.position)} the {thing.position}"


def _preposition(position: str) -> str:
    return "in" if position == "middle" else "at"


def _may_stand_together(first: Thing, second: Thing) -> bool:
    (column, row), (other_column, other_row) = POSITIONS[first.position], POSITIONS[second.position]
    is_apart = abs(column - other_column) == 2 or abs(row - other_row) == 2
    return is_apart and first.colour != second.colour


def _sample_thing(rng: Random) -> Thing:
    return Thing(rng.choice(SIZES), rng.choice(COLOURS), rng.choice(SHAPES), rng.choice(tuple(POSITIONS)))


def _one_of(words: tuple[str, ...] | dict[str, tuple[int, int]]) -> str:
    # Longest first, so that "top left" is not read as "top".
    return "|".join(sorted(words, key=len, reverse=True))


_POSITION_PHRASE = "|".join(
    f"{_preposition(position)} the {position}" for position in sorted(POSITIONS, key=len, reverse=True)
)
_THING = re.compile(
    f"a ({_one_of(SIZES)}) ({_one_of(COLOURS)}) ({_one_of(SHAPES)}) (?:in|at) the ({_one_of(POSITIONS)})"
)
_THING_PHRASE = f"a (?:{_one_of(SIZES)}) (?:{_one_of(COLOURS)}) (?:{_one_of(SHAPES)}) (?:{_POSITION_PHRASE})"
_CAPTION = re.compile(
    f"(?P<things>{_THING_PHRASE}(?: and {_THING_PHRASE})?)"
    f" on a (?P<background>{_one_of(BACKGROUNDS)}) background"
)

"""Pictures of results: original, parallel and difference side by side; and how far two pictures are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

_PAGE = (255, 255, 255)
_INK = (30, 30, 30)
_FADED = (110, 110, 110)
_GAP = 12
_SMALLEST_CELL = 192
_LARGEST_CELL = 1024


def psnr_db(reference: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures of one size, in dB; infinite when equal."""
    difference = _pixels(reference).astype(np.float64) - _pixels(other)
    mean_square = float(np.mean(difference**2))
    return math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)


def difference_picture(reference: Image.Image, other: Image.Image, amplification: float) -> Image.Image:
    """Absolute difference per colour channel times `amplification`, clipped: black is equal."""
    difference = np.abs(_pixels(reference).astype(np.float64) - _pixels(other))
    return Image.fromarray(np.clip(np.rint(difference * amplification), 0, 255).astype(np.uint8))


def side_by_side(
    rows: Sequence[tuple[Image.Image, Image.Image]],
    captions: Sequence[str] | None = None,
    *,
    amplification: float = 8.0,
    columns: tuple[str, str] = ("one device, in order", "asyncdiff"),
    across: int = 1,
) -> Image.Image:
    """One row per pair: original | parallel | difference x `amplification`, with column titles and captions.

    Small pictures are enlarged by a whole number without smoothing, so that what is seen is what was
    computed; each pair's PSNR stands under its difference. `captions`: one line per pair, shortened to fit.
    `across`: how many pairs stand beside each other. `ValueError` if rows and captions differ in number.
    """
    if captions is not None and len(captions) != len(rows):
        raise ValueError(f"{len(captions)} captions for {len(rows)} rows.")
    layout = _Layout.of(rows, min(across, len(rows)))
    page = Image.new("RGB", layout.page_size, _PAGE)
    draw = ImageDraw.Draw(page)
    for group in range(layout.across):
        titles = (*columns, f"difference x {amplification:g}")
        for left, title in zip(layout.lefts(group), titles, strict=True):
            draw.text((left, _GAP), _fit(title, layout.title_font, layout.width), _INK, layout.title_font)
    for index, (original, parallel) in enumerate(rows):
        lefts, top = layout.lefts(index % across), layout.top(index // across)
        cells = (original, parallel, difference_picture(original, parallel, amplification))
        for left, cell in zip(lefts, cells, strict=True):
            page.paste(_resized(cell, layout.scale), (left, top))
        under = top + layout.height + 2
        if captions is not None:
            text = _fit(captions[index], layout.font, 2 * layout.width + _GAP)
            draw.text((lefts[0], under), text, _INK, layout.font)
        draw.text((lefts[2], under), _psnr_text(original, parallel), _FADED, layout.font)
    return page


def against_reference(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    captions: Sequence[str],
    *,
    amplification: float = 8.0,
) -> Image.Image:
    """Pictures of each of `captions` in rows: the first is the reference, every other one shows its pictures
    beside their difference x `amplification` from the reference, with the PSNR under it.

    `rows`: title and one picture per caption. `ValueError` if they differ in number.
    """
    if any(len(pictures) != len(captions) for _, pictures in rows):
        raise ValueError(f"Every row must have {len(captions)} pictures.")
    original = rows[0][1]
    layout = _Layout.of([(picture, picture) for picture in original], 1)
    font, cell = layout.font, layout.width + _GAP
    left = _GAP + math.ceil(max(font.getlength(title) for title, _ in rows)) + _GAP
    page = Image.new("RGB", (left + 2 * cell * len(captions), layout.top(len(rows))), _PAGE)
    draw = ImageDraw.Draw(page)
    for column, caption in enumerate(captions):
        text = _fit(caption, layout.title_font, 2 * cell - _GAP)
        draw.text((left + 2 * cell * column, _GAP), text, _INK, layout.title_font)
    for row, (title, pictures) in enumerate(rows):
        top = layout.top(row)
        draw.text((_GAP, top), title, _INK, font)
        for column, (reference, picture) in enumerate(zip(original, pictures, strict=True)):
            place = left + 2 * cell * column
            page.paste(_resized(picture, layout.scale), (place, top))
            if row == 0:
                draw.text((place + cell, top), f"difference x {amplification:g}", _FADED, font)
            else:
                difference = difference_picture(reference, picture, amplification)
                page.paste(_resized(difference, layout.scale), (place + cell, top))
                under = (place + cell, top + layout.height + 2)
                draw.text(under, _psnr_text(reference, picture), _FADED, font)
    return page


@dataclass(frozen=True)
class _Layout:
    """Where the cells of a page are, in pixels; `width` and `height` of one cell, `scale` of the pictures."""

    width: int
    height: int
    scale: float
    across: int
    down: int

    @classmethod
    def of(cls, rows: Sequence[tuple[Image.Image, Image.Image]], across: int) -> _Layout:
        width = max(picture.width for pair in rows for picture in pair)
        height = max(picture.height for pair in rows for picture in pair)
        scale: float = max(1, math.ceil(_SMALLEST_CELL / width))
        if width > _LARGEST_CELL:
            scale = _LARGEST_CELL / width
        return cls(round(width * scale), round(height * scale), scale, across, math.ceil(len(rows) / across))

    @property
    def title_font(self) -> _Font:
        return _font(self.width / 12)

    @property
    def font(self) -> _Font:
        return _font(self.width / 14)

    @property
    def group_width(self) -> int:
        return 3 * (self.width + _GAP) + _GAP

    @property
    def page_size(self) -> tuple[int, int]:
        return self.across * self.group_width, self.top(self.down)

    def lefts(self, group: int) -> list[int]:
        return [group * self.group_width + _GAP + column * (self.width + _GAP) for column in range(3)]

    def top(self, row: int) -> int:
        row_height = self.height + _line_height(self.font) + _GAP
        return _line_height(self.title_font) + 2 * _GAP + row * row_height


def _psnr_text(original: Image.Image, parallel: Image.Image) -> str:
    psnr = psnr_db(original, parallel)
    return "identical" if math.isinf(psnr) else f"PSNR {psnr:.1f} dB"


def _pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def _resized(picture: Image.Image, scale: float) -> Image.Image:
    if scale == 1:
        return picture.convert("RGB")
    size = (round(picture.width * scale), round(picture.height * scale))
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, how)


def _font(size: float) -> _Font:
    return ImageFont.load_default(size=max(12.0, min(size, 36.0)))


def _line_height(font: _Font) -> int:
    return math.ceil(font.getbbox("Ag")[3]) + 4


def _fit(text: str, font: _Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"

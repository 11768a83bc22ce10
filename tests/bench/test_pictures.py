"""Pictures of results show what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from asyncdiff.bench.pictures import difference_picture, psnr_db, side_by_side


def plain(value: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def test_psnr_of_a_constant_difference() -> None:
    # A difference of 5 everywhere: 10 log10(255^2 / 5^2), by hand 34.151 dB.
    assert psnr_db(plain(100), plain(105)) == pytest.approx(34.1514, abs=1e-4)


def test_psnr_does_not_wrap_around_in_eight_bits() -> None:
    assert psnr_db(plain(0), plain(255)) == pytest.approx(0.0)


def test_equal_pictures_have_infinite_psnr() -> None:
    assert math.isinf(psnr_db(plain(7), plain(7)))


def test_difference_is_amplified_and_clipped() -> None:
    assert difference_picture(plain(100), plain(97), 8).getpixel((0, 0)) == (24, 24, 24)
    assert difference_picture(plain(0), plain(200), 8).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("count", "across"), [(1, 1), (3, 1), (5, 2), (2, 4)])
def test_every_pair_is_on_the_page_unsmoothed(count: int, across: int) -> None:
    rng = np.random.default_rng(0)
    originals = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]
    page = side_by_side(
        [(picture, picture) for picture in originals], [f"row {i}" for i in range(count)], across=across
    )
    pixels = np.asarray(page)
    for picture in originals:
        enlarged = np.asarray(picture).repeat(3, axis=0).repeat(3, axis=1)
        corner = enlarged[:3, :, :]  # its first row of pixels, three times
        found = np.lib.stride_tricks.sliding_window_view(pixels, corner.shape)[:, :, 0]
        tops = [found[y] for y in range(found.shape[0]) if (found[y] == corner).all(axis=(1, 2, 3)).any()]
        assert tops, "the picture is not on the page"


def test_large_pictures_are_shrunk_to_a_page_that_can_be_looked_at() -> None:
    page = side_by_side([(plain(10, (4096, 2048)), plain(20, (4096, 2048)))])
    assert page.width < 3 * 1024 + 100


def test_long_captions_are_cut() -> None:
    side_by_side([(plain(1), plain(2))], ["a red circle " * 50])


def test_captions_must_match_the_rows() -> None:
    with pytest.raises(ValueError, match="2 captions for 1 rows"):
        side_by_side([(plain(1), plain(2))], ["a", "b"])

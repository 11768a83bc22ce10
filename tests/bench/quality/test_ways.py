"""Lists of settings are combined; what is none is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncdiff.bench.configurations import Configuration
from asyncdiff.bench.quality.ways import Way, parse_ways
from asyncdiff.bench.quality.weights import LocalWeights
from asyncdiff.errors import ConfigurationError


def test_every_combination_once_those_of_a_configuration_together() -> None:
    ways = parse_ways("2x1,3x2,2x1", "none,linear", "paper", "1,auto")
    assert [str(way) for way in ways] == [
        "2x1 the paper's rule, w=1",
        "2x1 linear, w=1",
        "2x1 the paper's rule, w=auto",
        "2x1 linear, w=auto",
        "3x2 the paper's rule, w=1",
        "3x2 linear, w=1",
        "3x2 the paper's rule, w=auto",
        "3x2 linear, w=auto",
    ]
    assert ways[1] == Way(Configuration(2, 1), "linear", "paper", 1)


def test_only_the_published_settings_are_called_the_papers_rule() -> None:
    rules = {
        (way.forecast, way.freshness): way.rule for way in parse_ways("2x1", "none,linear", "paper,auto", "1")
    }
    assert rules == {
        ("none", "paper"): "the paper's rule",
        ("none", "auto"): "no forecast, fresh reads",
        ("linear", "paper"): "linear",
        ("linear", "auto"): "linear, fresh reads",
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("2", "none", "paper", "1"), "--configs 2: '2' is no configuration. Use STAGESxSTRIDE"),
        (("1x1", "none", "paper", "1"), "1x1 takes 1 devices (stages + stride - 1), but must take 2 or more"),
        (("auto", "none", "paper", "1"), "--configs auto: 'auto' is no configuration"),
        (("2x1", "cubic", "paper", "1"), "--forecast cubic: 'cubic' is none of"),
        (("2x1", "none,", "paper", "1"), "--forecast none,: '' is none of"),
        (("2x1", "none", "newest", "1"), "--freshness newest: 'newest' is none of"),
        (("2x1", "none", "paper", "0"), "--warmup-steps 0: '0' is neither 'auto' nor"),
        (("2x1", "none", "paper", "1,x"), "--warmup-steps 1,x: 'x' is neither"),
    ],
)
def test_what_is_no_setting_is_named(arguments: tuple[str, str, str, str], expected: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        parse_ways(*arguments)
    assert expected in str(error.value)


def _folder_of_pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.png").touch()
    (folder / "notes.txt").touch()
    return folder


def test_fid_wants_a_thousand_pictures_of_both_kinds(tmp_path: Path) -> None:
    weights = tmp_path / "inception.pth"
    weights.touch()
    few = LocalWeights(fid=weights, fid_images=_folder_of_pictures(tmp_path / "few", 999))
    with pytest.raises(ConfigurationError, match="has 999 pictures, but FID needs 1000 or more"):
        few.check(5000)
    enough = LocalWeights(fid=weights, fid_images=_folder_of_pictures(tmp_path / "enough", 1000))
    with pytest.raises(ConfigurationError, match="--num-captions 999: FID needs 1000"):
        enough.check(999)


def test_weights_are_never_looked_for_elsewhere(tmp_path: Path) -> None:
    here = tmp_path / "here.pth"
    here.touch()
    for weights, expected in (
        (LocalWeights(lpips=tmp_path / "alex.pth"), "alex.pth: is no file. Nothing is downloaded"),
        (LocalWeights(fid=tmp_path / "inception.pth"), "inception.pth: is no file. Nothing is downloaded"),
        (LocalWeights(clip=tmp_path), "must be a folder with config.json"),
        (LocalWeights(fid=here), "--fid-weights and --fid-images belong together"),
        (LocalWeights(fid_images=tmp_path), "--fid-weights and --fid-images belong together"),
        (LocalWeights(fid=here, fid_images=tmp_path / "no"), "no: is no folder"),
    ):
        with pytest.raises(ConfigurationError) as error:
            weights.check(5000)
        assert expected in str(error.value)


def test_guidance_is_refreshed_where_that_is_possible() -> None:
    ways = parse_ways("2x1,1x2", "linear,latents", "auto", "1,auto", guidance_refresh="1,4")
    refreshed = [way for way in ways if way.guidance_refresh > 1]
    assert refreshed == [Way(Configuration(2, 1), "latents", "auto", 1, None, 4)]
    assert str(refreshed[0]) == "2x1 latents, fresh reads, guidance every 4, w=1"
    assert refreshed[0].settings["guidance_refresh"] == 4
    assert len(ways) == 2 * 2 * 2 + 1
    with pytest.raises(ConfigurationError, match="--guidance-refresh 2: goes with forecast 'latents'"):
        parse_ways("2x1", "linear", "auto", "1", guidance_refresh="2")
    with pytest.raises(ConfigurationError, match="'0' is no number of 1 or more"):
        parse_ways("2x1", "latents", "auto", "1", guidance_refresh="0")

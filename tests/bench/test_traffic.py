"""Every cut in the list is what it says it is."""

from __future__ import annotations

import pytest

from asyncdiff.bench.architectures import architecture_named, build_denoiser
from asyncdiff.bench.traffic import IMBALANCES, WEIGHT_TARGETS, Cut, Traffic, measure_traffic


@pytest.fixture(scope="module")
def found() -> Traffic:
    """Of the demo, for which there is no cut within 53 %: every part holds the glue."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(WEIGHT_TARGETS, 2, 0.60)
        return measure_traffic("demo", 2)


def named(found: Traffic, how: str) -> list[Cut]:
    return [cut for cut in found.cuts if cut.how == how]


def test_limits_are_kept_and_what_they_allow_is_used(found: Traffic) -> None:
    for kind in ("chain", "nested"):
        (even,) = (cut for cut in named(found, "as even as possible") if cut.kind == kind)
        fewest = even.crossing_bytes
        for imbalance in IMBALANCES:
            (cut,) = (c for c in named(found, f"fewest bytes within {imbalance:.0%}") if c.kind == kind)
            assert cut.crossing_bytes <= fewest
            assert cut.imbalance < (1 + even.imbalance) * (1 + imbalance)
            fewest = cut.crossing_bytes
    light = named(found, "weights within 60%") + named(found, "weights within 60%, fewest bytes within 10%")
    fewest_of = {cut.kind: cut for cut in named(found, "weights within 60%, fewest bytes however uneven")}
    assert {cut.kind for cut in light} == set(fewest_of) == {"chain", "nested"}
    for cut in (*light, *fewest_of.values()):
        assert cut.largest_weight_share < 0.605
        assert fewest_of[cut.kind].crossing_bytes <= cut.crossing_bytes


def test_shares_are_of_all_weights(found: Traffic) -> None:
    for cut in found.cuts:
        assert len(cut.weight_shares) == 2
        assert 1 <= sum(cut.weight_shares) < 1.1


def test_prediction_is_that_of_the_latents(found: Traffic) -> None:
    import torch

    architecture = architecture_named("demo")
    channels = build_denoiser(architecture, torch.float32).config.out_channels
    _, height, width = architecture.latent_shape(found.height, found.width)
    assert found.prediction_bytes == 2 * found.batch * channels * height * width
    assert found.to_json()["cuts"][0]["how"] == "the planner's choice"
    assert len(found.rows()) == len(found.cuts)

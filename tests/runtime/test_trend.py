"""The damping of a forecast, against sums written out, and what must not change it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from asyncdiff.config import STATE_FORECASTS
from asyncdiff.runtime.trend import Trend, sampled


def versions(count: int, shape: tuple[int, ...] = (3, 5)) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).cumsum(0) for _ in range(count)]


def dampings(states: dict[int, torch.Tensor]) -> list[float]:
    """Of every line through two neighbours, in the order in which they come."""
    trend, found = Trend(), []
    for b, a in pairwise(states):
        trend.observe(states[a], states[b], (a, b))
        found.append(float(trend.damping))
    return found


def expected(states: dict[int, torch.Tensor]) -> list[float]:
    labels = list(states)
    found, along, whole = [1.0], 0.0, 0.0
    for c, b, a in zip(labels, labels[1:], labels[2:], strict=False):
        change = (states[a] - states[b]).double().flatten()
        promised = (states[b] - states[c]).double().flatten() * (a - b) / (b - c)
        along = along / 2 + float(change @ promised)
        whole = whole / 2 + float(promised @ promised)
        found.append(min(1.0, max(0.0, along / whole)))
    return found


@pytest.mark.parametrize("labels", [(0, 1, 2, 3, 4), (0, 1, 3, 5, 7, 8), (2, 5, 6)])
def test_it_is_least_squares_over_the_last_changes(labels: tuple[int, ...]) -> None:
    states = dict(zip(labels, versions(len(labels)), strict=True))
    assert dampings(states) == pytest.approx(expected(states), abs=1e-5)


def test_a_straight_line_is_continued_and_a_zigzag_is_not() -> None:
    start, slope = versions(2)
    assert dampings({s: start + s * slope for s in (0, 1, 2, 4, 6)}) == pytest.approx([1.0] * 4, abs=1e-5)
    assert dampings({s: start + (s % 2) * slope for s in range(5)}) == [1.0, 0.0, 0.0, 0.0]
    assert dampings(dict.fromkeys(range(4), start)) == [1.0, 0.0, 0.0], "nothing moves: nothing is continued"
    halving = {s: start - 0.5**s * slope for s in range(6)}
    assert dampings(halving)[1:] == pytest.approx([0.5] * 4, abs=1e-4)


def test_a_round_that_is_run_again_counts_once() -> None:
    """Also if the first time it had another version."""
    a, b, c, d, wrong = versions(5)
    once, twice = Trend(), Trend()
    for trend in (once, twice):
        trend.observe(b, a, (1, 0))
        trend.observe(c, b, (2, 1))
    twice.observe(wrong, c, (3, 2))
    for trend in (once, twice):
        trend.observe(d, c, (3, 2))
    assert twice.damping == once.damping
    for trend in (once, twice):
        trend.observe(a, d, (4, 3))
    assert twice.damping == once.damping


def test_after_a_gap_nothing_is_known() -> None:
    a, b, c, d, e = versions(5)
    trend = Trend()
    trend.observe(b, a, (1, 0))
    trend.observe(c, b, (2, 1))
    assert trend.damping != 1.0
    trend.observe(e, d, (7, 6))
    assert trend.damping == 1.0
    for forecast in STATE_FORECASTS:
        assert float(trend.error(forecast)) == pytest.approx(float((e - d).norm() / e.norm()))


def test_the_error_is_that_of_each_forecast() -> None:
    a, b, c, d = versions(4)
    trend = Trend()
    trend.observe(b, a, (1, 0))
    missed = pytest.approx(float((b - a).norm() / b.norm()))
    assert [float(trend.error(forecast)) for forecast in STATE_FORECASTS] == [missed] * 3
    trend.observe(c, b, (2, 1))
    damping = float(trend.damping)
    trend.observe(d, c, (4, 2))
    promised = {"none": c, "linear": c + 2 * (c - b), "damped": c + 2 * damping * (c - b)}
    for forecast, value in promised.items():
        assert float(trend.error(forecast)) == pytest.approx(float((d - value).norm() / d.norm()), rel=1e-5)


def test_nothing_is_missed_of_nothing() -> None:
    trend, zero = Trend(), torch.zeros(3)
    trend.observe(zero, zero, (1, 0))
    trend.observe(zero, zero, (2, 1))
    assert float(trend.error("linear")) == 0.0


@pytest.mark.parametrize("shape", [(), (7,), (2, 64, 32, 32), (1, 5000, 3), (9001,), (0, 4)])
def test_the_sample_depends_on_values_and_not_on_memory(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    sample = sampled(tensor)
    assert sample.dim() == 1
    assert min(tensor.numel(), 2048) <= sample.numel() <= 8192
    order = list(reversed(range(tensor.dim())))
    turned = tensor.permute(order).contiguous().permute(order)
    assert torch.equal(sampled(turned), sample)
    assert set(sample.tolist()) <= set(tensor.flatten().tolist())

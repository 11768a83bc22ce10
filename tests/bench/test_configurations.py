"""Which configurations there are, and when their steady state begins."""

from __future__ import annotations

import pytest

from asyncdiff.bench.configurations import Configuration, parse_configurations
from asyncdiff.config import settle
from asyncdiff.errors import ConfigurationError


@pytest.mark.parametrize("num_devices", [2, 3, 4, 6])
def test_auto_is_every_pair_that_fits_and_takes_more_than_one_device(num_devices: int) -> None:
    found = parse_configurations("auto", num_devices)
    expected = {
        (stages, stride)
        for stages in range(1, 9)
        for stride in range(1, 9)
        if 2 <= stages + stride - 1 <= num_devices
    }
    assert {(each.num_stages, each.stride) for each in found} == expected
    assert len(found) == len(expected)
    for each in found:
        assert settle(None, each.num_stages, each.stride)[1] == each.num_devices


def test_list_keeps_its_order_and_drops_repetitions() -> None:
    assert parse_configurations("3x1, 2x2,3x1", 3) == (Configuration(3, 1), Configuration(2, 2))


def test_written_form_is_read_back() -> None:
    every = parse_configurations("auto", 5)
    assert parse_configurations(",".join(map(str, every)), 5) == every


@pytest.mark.parametrize("text", ["", "2", "2*1", "0x2", "2x0", "-2x1", "2x1,", "two", "2x1x1"])
def test_what_is_no_configuration_is_named(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is no configuration"):
        parse_configurations(text, 4)


@pytest.mark.parametrize("text", ["1x1", "3x1", "2x2"])
def test_what_does_not_fit_two_devices_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{text} takes . devices"):
        parse_configurations(text, 2)


def test_one_device_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--devices 1"):
        parse_configurations("auto", 1)


@pytest.mark.parametrize(("stages", "stride", "warmup_steps"), [(2, 1, 1), (2, 3, 2), (1, 2, 4)])
def test_shortest_run_has_one_whole_round_of_the_steady_state(
    stages: int, stride: int, warmup_steps: int
) -> None:
    from asyncdiff.bench.timed_run import TimedRun

    each = Configuration(stages, stride)
    first, steps = each.first_steady_step(warmup_steps), each.shortest_run(warmup_steps)
    assert (first - warmup_steps) % stride == 0
    ends = tuple(float(step) for step in range(1, steps + 1))
    assert TimedRun(ends[-1], ends).round_seconds(first, stride) == [1.0]
    assert TimedRun(ends[-2], ends[:-1]).round_seconds(first, stride) == []

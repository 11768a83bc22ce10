"""Settings that have no schedule are refused in one clear line."""

from __future__ import annotations

import re

import pytest

from asyncdiff.config import Settings, can_split, settle, settle_groups
from asyncdiff.errors import ConfigurationError
from asyncdiff.schedule import build_schedule, from_dict


def test_stages_follow_from_devices() -> None:
    assert settle(4, None, 1) == (4, 4)
    assert settle(4, None, 2) == (3, 4)
    assert settle(2, None, 2) == (1, 2)


def test_workers_follow_from_stages() -> None:
    assert settle(None, 3, 2) == (3, 4)
    assert settle(4, 3, 2) == (3, 4)


def test_too_few_devices_say_the_rule_and_the_way_out() -> None:
    with pytest.raises(ConfigurationError) as caught:
        settle(2, 3, 2)
    assert str(caught.value) == (
        "num_stages=3 with stride=2 needs 4 devices (num_stages + stride - 1), but 2 were given. "
        "Use num_stages=2 with stride=1, or pass 4 devices."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, None, 2), "stride=2 needs at least 2 devices (num_stages + stride - 1), but 1 was given."),
        (
            (5, 2, 1),
            "num_stages=2 with stride=1 needs 2 devices (num_stages + stride - 1), but 5 were given.",
        ),
        ((2, 1, 1), "needs 1 device (num_stages + stride - 1), but 2 were given."),
        ((None, None, 1), "Neither devices nor num_stages was given."),
        ((None, True, 1), "num_stages must be an integer, but True (bool) was given."),
        (("2", None, 1), "the number of devices must be an integer, but '2' (str) was given."),
        ((None, 2, 1.0), "stride must be an integer, but 1.0 (float) was given."),
        ((None, 2, 0), "stride must be at least 1, but 0 was given."),
        ((0, None, 1), "the number of devices must be at least 1, but 0 was given."),
        ((None, -1, 1), "num_stages must be at least 1, but -1 was given."),
    ],
)
def test_impossible_counts_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        settle(*arguments)


def test_groups_follow_from_devices() -> None:
    """2 x (N + S - 1) devices; 3 x where two do not fit."""
    assert settle_groups(4, None, 1, "split") == settle_groups(4, 2, 1, "split") == 2
    assert settle_groups(6, 2, 2, "split") == settle_groups(6, None, 3, "split") == 2
    assert settle_groups(6, 2, 1, "split") == settle_groups(3, None, 1, "split") == 3
    assert settle_groups(None, 2, 1, "split") == 2
    assert settle_groups(4, 4, 1, "together") == settle_groups(4, None, 1, "auto") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (4, 4, 1, "split"),
            'guidance="split" with num_stages=4 and stride=1 needs 2 x (num_stages + stride - 1) devices, or '
            '3 x for three-way guidance, but 4 were given. Pass 8 devices, or use guidance="together".',
        ),
        ((1, None, 1, "split"), "but 1 was given. Pass 2 devices"),
        ((5, None, 1, "split"), "but 5 were given. Pass 2 devices"),
        ((4, None, 3, "split"), "but 4 were given. Pass 6 devices"),
        ((4, 2, 1, "both"), 'guidance must be "auto", "split" or "together", but \'both\' was given.'),
        ((4, "2", 1, "split"), "num_stages must be an integer"),
        ((4, None, 0, "auto"), "stride must be at least 1"),
    ],
)
def test_devices_that_make_no_groups_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        settle_groups(*arguments)


def test_auto_may_split_where_no_number_of_stages_was_asked_for() -> None:
    assert can_split(2, None, 1, "auto")
    assert can_split(4, None, 2, "auto")
    for arguments in ((3, None, 1), (2, 2, 1), (2, None, 2), (None, 2, 1), (4, 2, 1)):
        assert not can_split(*arguments, "auto")
    assert not can_split(2, None, 1, "together")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 0}, "warmup_steps must be at least 1, but 0 was given."),
        ({"groups": 0}, "groups must be at least 1, but 0 was given."),
        ({"groups": 4}, "groups must be at most 3, but 4 was given."),
        ({"warmup_steps": "1"}, "warmup_steps must be an integer, but '1' (str) was given."),
        ({"stride": True}, "stride must be an integer, but True (bool) was given."),
        ({"time_shift": 1}, "time_shift must be True or False, but 1 was given."),
        (
            {"forecast": "quadratic"},
            'forecast must be "none", "linear", "damped" or "latents", but \'quadratic\' was given.',
        ),
        ({"forecast": None}, 'forecast must be "none", "linear", "damped" or "latents", but None was given.'),
    ],
)
def test_impossible_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        Settings(**{"num_stages": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "ring"}, 'kind must be "chain" or "nested"'),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"first_step": 5}, "num_steps must be at least 6"),
        ({"first_step": -1}, "first_step must be at least 0"),
        ({"crossings": [(1, 0)]}, "Nothing can cross between the segments [(1, 0)]"),
        ({"kind": "nested", "crossings": [(0, 2)]}, "Nothing can cross between the segments [(0, 2)]"),
    ],
)
def test_impossible_schedules_are_refused(changes: dict, message: str) -> None:
    good = {"kind": "chain", "num_stages": 2, "stride": 1, "warmup_steps": 1, "num_steps": 5}
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        build_schedule(**{**good, **changes})


def test_workers_of_settings() -> None:
    assert Settings(3, stride=2).num_workers == 4
    assert Settings(3, stride=2, groups=2).num_workers == 8
    assert Settings(3, stride=2, groups=2).group_size == 4


def test_other_format_versions_of_a_schedule_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="format version 3"):
        from_dict({"format_version": 3})

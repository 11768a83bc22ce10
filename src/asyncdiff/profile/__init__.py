"""Timing blocks, and devices against each other, on the devices themselves."""

from asyncdiff.profile.calls import add_up, time_calls
from asyncdiff.profile.speeds import relative_speeds

__all__ = ["add_up", "relative_speeds", "time_calls"]

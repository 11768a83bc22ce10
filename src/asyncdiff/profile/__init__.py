"""Timing blocks on the device itself."""

from asyncdiff.profile.calls import time_calls

__all__ = ["time_calls"]

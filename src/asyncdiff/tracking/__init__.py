"""Which run, which step, which channel a denoiser call belongs to. Pure: standard library only."""

from asyncdiff.tracking.tracker import Channel, Extent, Position, Settle, Tracker

__all__ = ["Channel", "Extent", "Position", "Settle", "Tracker"]

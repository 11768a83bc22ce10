"""Where processes that were started for a measurement find each other."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist


def meeting_point(folder: Path, num_ranks: int) -> dist.Store:
    """A store in an empty folder that all of them can see; it goes with the folder."""
    return dist.FileStore(str(folder / "store"), num_ranks)

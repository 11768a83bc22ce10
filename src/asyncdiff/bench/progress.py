"""How a measurement tells whoever started it how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with (what is being done, done so far, total); total 0 where nobody knows."""


def no_progress(what: str, done: int, total: int) -> None:
    """Tell nobody."""

"""What the interpreter of a rank needs from whatever carries its tensors."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch

from asyncdiff.graph import TensorSpec


class Stream(IntEnum):
    """Tensors of one stream between two ranks arrive in the order in which they were sent."""

    INPUT = 1
    STATE = 2
    PREDICTION = 3
    WEIGHTS = 4


@dataclass(frozen=True)
class Parcel:
    """Which tensor of a round this is: the local executor finds it by this, others by order."""

    stream: Stream
    label: Hashable


class Pending(Protocol):
    """A tensor that has been asked for."""

    def wait(self) -> torch.Tensor:
        """The tensor, as soon as it is there."""


class Link(Protocol):
    """Point-to-point transfers of one rank. Neither call waits for the peer."""

    def send(self, to_rank: int, parcel: Parcel, tensor: torch.Tensor, spec: TensorSpec) -> None: ...

    def receive(self, from_rank: int, parcel: Parcel, spec: TensorSpec) -> Pending: ...

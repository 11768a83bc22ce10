"""In the place of `CudaCapture` where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree


class Again:
    """A replay runs the function once more, into the memory of what it returned when it was captured: that
    holds nothing before the first replay, as on a GPU, where a capture computes nothing."""

    def __init__(self, device: object = None) -> None:
        self.captured = 0
        self.replayed = 0

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captured += 1
        returned = run()
        memory = _tensors(returned)
        for tensor in memory:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                for tensor, computed in zip(memory, _tensors(run()), strict=True):
                    tensor.copy_(computed)

        return replay, returned


def _tensors(of: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(of) if isinstance(leaf, torch.Tensor)]

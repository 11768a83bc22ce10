"""From tensors to their specs and back to tensors that only look like them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from asyncdiff.graph import TensorSpec

MakePlaceholder = Callable[[TensorSpec, torch.device], torch.Tensor]


class no_gradients(torch.no_grad):  # noqa: N801 (used like `torch.no_grad`)
    """As `torch.no_grad`, but entered within another one it costs next to nothing."""

    def __enter__(self) -> None:
        self._is_first = torch.is_grad_enabled()
        if self._is_first:
            super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        if self._is_first:
            super().__exit__(*exc)


def dtype_of(spec: TensorSpec) -> torch.dtype:
    return getattr(torch, spec.dtype)


def zero_placeholder(spec: TensorSpec, device: torch.device) -> torch.Tensor:
    """A tensor with the recorded shape, strides and dtype, all zeros.

    Real strides: an expanded scalar fails on `.view`. Zeros: glue may index with an integer placeholder.
    """
    extent = 1 + sum((size - 1) * stride for size, stride in zip(spec.shape, spec.stride, strict=True))
    if 0 in spec.shape:
        extent = 0
    return torch.zeros(extent, dtype=dtype_of(spec), device=device).as_strided(spec.shape, spec.stride)

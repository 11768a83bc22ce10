"""The strides that fake tensors of torch 2.13 get wrong: of dimensions of size 1.

They decide nothing about where elements lie, but the next convolution looks at them: one picture alone, as
an attention layer leaves it, passes for channels-last in a recording and not when it is computed, and a
state that is handed over in the wrong memory format is rounded differently from then on.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from asyncdiff.trace.torch_private import FakeTensor, tree_flatten, tree_unflatten, unset_fake_temporarily

_DIMS_WITH_FORMATS = (4, 5)  # channels-last is a format of pictures and videos
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def with_real_strides(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
    """What `func(*args, **kwargs)` returned, on fake tensors, with the strides that real ones would have had.

    Only views and pointwise operators differ, the latter only on what already has unusual strides.
    """
    if not isinstance(out, FakeTensor) or out.dim() not in _DIMS_WITH_FORMATS or 1 not in out.shape:
        return out
    if func in _VIEWS:
        strides = _strides_of_view(tuple(args[0].shape), args[0].stride(), tuple(out.shape))
    elif torch.Tag.pointwise in func.tags and not func._schema.is_mutable:
        leaves, structure = tree_flatten((args, kwargs))
        if not any(isinstance(leaf, FakeTensor) and _is_unusual(leaf) for leaf in leaves):
            return out
        with unset_fake_temporarily():
            real = [_real(leaf) if isinstance(leaf, FakeTensor) else leaf for leaf in leaves]
            real_args, real_kwargs = tree_unflatten(real, structure)
            strides = func(*real_args, **real_kwargs).stride()
    else:
        return out
    return out if strides == out.stride() else out.as_strided(out.shape, strides, out.storage_offset())


@functools.lru_cache(maxsize=4096)
def _strides_of_view(
    shape: tuple[int, ...], strides: tuple[int, ...], viewed: tuple[int, ...]
) -> tuple[int, ...]:
    """Meta tensors that are not fake have them right."""
    with unset_fake_temporarily():
        return torch.empty_strided(shape, strides, device="meta").view(viewed).stride()


def _is_unusual(tensor: torch.Tensor) -> bool:
    """Whether a dimension of size 1 has another stride than in row-major order, and than if it came before or
    after all the others."""
    sizes = list(zip(tensor.shape, tensor.stride(), strict=True))
    beyond = max((size * stride for size, stride in sizes if size > 1), default=1)
    return any(
        size == 1 and stride not in (1, beyond, math.prod(tensor.shape[dim + 1 :]))
        for dim, (size, stride) in enumerate(sizes)
    )


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)

"""Everything of torch's private API that the trace and the stages use, in one place.

Holds for torch 2.6 to 2.13 as far as the names go; `tests/trace/test_torch_private.py` says which versions were run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

TreeSpec = pytree.TreeSpec

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "TorchFunctionMode",
    "TreeSpec",
    "eager_flex_attention",
    "flops_of",
    "key_path_name",
    "storage_key",
    "tree_flatten",
    "tree_flatten_named",
    "tree_unflatten",
]


def tree_flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """Leaves and structure of nested lists, tuples, dicts and registered outputs; None is a leaf."""
    return pytree.tree_flatten(tree)


def tree_unflatten(leaves: list[Any], structure: TreeSpec) -> Any:
    """The inverse of `tree_flatten`, with containers of its own."""
    return pytree.tree_unflatten(leaves, structure)


def tree_flatten_named(tree: dict[str, Any]) -> tuple[list[str], list[Any], TreeSpec]:
    """Like `tree_flatten`, with the dotted name of every leaf (`"added_cond_kwargs.text_embeds"`)."""
    pairs, structure = pytree.tree_flatten_with_path(tree)
    return [key_path_name(path) for path, _ in pairs], [leaf for _, leaf in pairs], structure


def key_path_name(path: tuple[Any, ...]) -> str:
    """`(MappingKey("a"), SequenceKey(3))` -> `"a.3"`."""
    return ".".join(_key_name(key) for key in path)


def _key_name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def storage_key(tensor: torch.Tensor) -> int | None:
    """Identifies a tensor's storage while it lives; None for tensors without one (sparse, wrapper subclasses)."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def _cpu_flash_attention_flops(query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _missing_formulas() -> dict[Any, Any]:
    """Operators that torch's flop counter has no formula for."""
    name = "_scaled_dot_product_flash_attention_for_cpu"
    packet = getattr(torch.ops.aten, name, None)
    return {} if packet is None or packet in flop_registry else {packet: _cpu_flash_attention_flops}


_MISSING = _missing_formulas()


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    """FLOPs (multiply-adds counted twice) of one operator call; 0 for those without a formula (elementwise)."""
    packet = getattr(func, "_overloadpacket", None)
    if packet in _MISSING:
        return float(_MISSING[packet](*args, **kwargs))
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=out))
    return 0.0


@contextlib.contextmanager
def eager_flex_attention() -> Iterator[None]:
    """Lets `flex_attention` run below a dispatch mode: without it torch tries to compile and refuses."""
    try:
        from torch.nn.attention import flex_attention
    except ImportError:
        yield
        return
    name = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    before = getattr(flex_attention, name, None)
    if before is None:
        yield
        return
    setattr(flex_attention, name, True)
    try:
        yield
    finally:
        setattr(flex_attention, name, before)

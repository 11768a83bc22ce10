"""Everything of torch's private API that the trace and the stages use, in one place.

Holds for torch 2.13; `tests/trace/test_torch_private.py` says with which versions it was run.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "Structure",
    "TorchDispatchMode",
    "TorchFunctionMode",
    "disabled_torch_function",
    "eager_flex_attention",
    "flops_of",
    "key_path_name",
    "quiet_failures_of_fake_tensors",
    "storage_key",
    "tree_flatten",
    "tree_flatten_named",
    "tree_unflatten",
    "unset_fake_temporarily",
    "wrapper",
]

# What a subclass of Tensor says that wants `__torch_dispatch__` alone.
disabled_torch_function = torch._C._disabled_torch_function_impl


def wrapper(
    kind: type[torch.Tensor],
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """A tensor of a subclass without memory of its own."""
    return torch.Tensor._make_wrapper_subclass(kind, shape, strides=stride, dtype=dtype, device=device)


@contextlib.contextmanager
def quiet_failures_of_fake_tensors() -> Iterator[None]:
    """An operation whose shapes do not fit raises all the same, but is not logged as an error."""
    log = logging.getLogger(FakeTensorMode.__module__)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


class Structure:
    """The nesting of a flattened tree (pytree's spec) that pickles without torch's own classes for leaves,
    whose unpickling warns."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        self.spec = spec
        self._repr: str | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self.spec == other.spec

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        if self._repr is None:
            self._repr = repr(self.spec)
        return self._repr

    def __reduce__(self) -> tuple[Any, ...]:
        return _structure_of, (_plain(self.spec),)


def _plain(spec: pytree.TreeSpec) -> Any:
    if spec.is_leaf():
        return None
    return (spec.type, spec.context, [_plain(child) for child in _children(spec)])


def _children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    return spec.children() if hasattr(spec, "children") else spec.children_specs


def _structure_of(plain: Any) -> Structure:
    return Structure(_spec_of(plain))


def _spec_of(plain: Any) -> pytree.TreeSpec:
    if plain is None:
        return pytree.tree_structure(0)
    kind, context, children = plain
    return pytree.TreeSpec(kind, context, [_spec_of(child) for child in children])


def tree_flatten(tree: Any) -> tuple[list[Any], Structure]:
    """Leaves and structure of nested lists, tuples, dicts and registered outputs; None is a leaf."""
    leaves, spec = pytree.tree_flatten(tree)
    return leaves, Structure(spec)


def tree_unflatten(leaves: list[Any], structure: Structure) -> Any:
    """The inverse of `tree_flatten`, with containers of its own."""
    return pytree.tree_unflatten(leaves, structure.spec)


def tree_flatten_named(tree: dict[str, Any]) -> tuple[list[str], list[Any], Structure]:
    """Like `tree_flatten`, with the dotted name of every leaf (`"added_cond_kwargs.text_embeds"`)."""
    if all(map(pytree.tree_is_leaf, tree.values())):
        return list(tree), list(tree.values()), _structure_without_nesting(tuple(tree))
    pairs, spec = pytree.tree_flatten_with_path(tree)
    return [key_path_name(path) for path, _ in pairs], [leaf for _, leaf in pairs], Structure(spec)


@functools.lru_cache(maxsize=256)
def _structure_without_nesting(names: tuple[str, ...]) -> Structure:
    return tree_flatten(dict.fromkeys(names))[1]


def key_path_name(path: tuple[Any, ...]) -> str:
    """`(MappingKey("a"), SequenceKey(3))` -> `"a.3"`."""
    return ".".join(_key_name(key) for key in path)


def _key_name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def storage_key(tensor: torch.Tensor) -> int | None:
    """Identifies a tensor's storage while it lives; None for tensors without one (sparse, wrapper
    subclasses)."""
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
    """FLOPs (multiply-adds counted twice) of one operator call; 0 for those without a formula
    (elementwise)."""
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

"""The tape: turns operator and module calls, as they happen, into the SSA form of `recording`."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from asyncdiff.trace.recording import Call, Leaf, ModelTensor, Op
from asyncdiff.trace.torch_private import flops_of, storage_key, tree_flatten
from asyncdiff.weights.ownership import tensor_spec

# Take shape and dtype of a tensor but not its data: counted as reads they would be phantom edges of the
# graph.
_NO_DATA = (
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
    "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided",
)  # fmt: skip
# Return something else than a tensor without looking at the data.
_METADATA = (
    "size", "stride", "numel", "dim", "device", "layout", "storage_offset",
    "sym_size", "sym_stride", "sym_numel", "sym_storage_offset",
    "is_contiguous", "sym_is_contiguous", "is_strides_like_format", "is_pinned", "is_same_size",
    "is_non_overlapping_and_dense", "_has_compatible_shallow_copy_type",
)  # fmt: skip
# Carry the tag of random operators because of their dropout argument only.
_ATTENTION = ("scaled_dot_product", "_flash_attention", "_efficient_attention", "_cudnn_attention")
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class _Traits:
    """What a schema says about an operator, looked up once."""

    written: tuple[int | str, ...]
    is_view: bool
    ignores_data: bool
    is_random: bool
    is_attention: bool
    has_dynamic_shape: bool
    is_metadata: bool


@cache
def _traits(func: Any) -> _Traits:
    schema = getattr(func, "_schema", None)
    if schema is None:  # a higher-order operator
        return _Traits((), False, False, False, False, False, False)
    name = schema.name.split("::")[-1]
    written: list[int | str] = []
    is_view = False
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is None:
            continue
        if argument.alias_info.is_write:
            written += [argument.name] if argument.kwarg_only else [index, argument.name]
        else:
            is_view = True
    is_attention = any(part in name for part in _ATTENTION)
    tags = func.tags
    return _Traits(
        written=tuple(written),
        is_view=is_view or name == "_unsafe_view",
        ignores_data=name in _NO_DATA,
        is_random=torch.Tag.nondeterministic_seeded in tags,
        is_attention=is_attention,
        has_dynamic_shape=torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags,
        is_metadata=name in _METADATA,
    )


class Tape:
    """Accumulates operations, calls and values. Tensors are held weakly: a real trace keeps no
    activations."""

    def __init__(self, tensors: Iterable[tuple[torch.Tensor, ModelTensor]]) -> None:
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self.makers: list[int] = []
        self.storages: list[int] = []
        self.num_elements: list[int] = []
        self.input_of: dict[int, str] = {}
        self.tensor_of: dict[int, int] = {}
        self.tensors: list[ModelTensor] = []
        self.innermost_failure: str | None = None
        self._stack: list[int] = []
        self._numbers: dict[str, int] = {}
        self._current: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._aliases: dict[int, tuple[int, list[weakref.ref[torch.Tensor]]]] = {}
        self._num_storages = 0
        for tensor, names in tensors:
            self.tensor_of[self._new_value(tensor, maker=-1)] = len(self.tensors)
            self.tensors.append(names)

    def note_input(self, name: str, tensor: torch.Tensor) -> None:
        self.input_of[self._new_value(tensor, maker=-1)] = name

    def value_of(self, tensor: torch.Tensor) -> int:
        """The tensor's value now. One never seen before came from outside, or is an alias made unseen
        (`.data`)."""
        known = self._current.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        aliases = self._live_aliases(tensor)
        if not aliases:
            return self._new_value(tensor, maker=-1)
        reads = tuple(self._current[id(alias)][1] for alias in aliases)
        value = self._new_value(tensor, maker=len(self.ops))
        self.ops.append(Op("alias", self._stack[-1], reads, (value,), (), 0.0, 0.0, False, False))
        return value

    def note_op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Records one operator call that has just run."""
        traits = _traits(func)
        if traits.is_metadata:
            return
        read_tensors = list(_tensors_in((args, kwargs)))
        out_tensors = list(_tensors_in(out))
        values = [self.value_of(tensor) for tensor in read_tensors]
        reads = () if traits.ignores_data else tuple(dict.fromkeys(values))
        op_index = len(self.ops)
        writes, carried = self._write(_written_tensors(traits, args, kwargs), op_index)
        known = {id(tensor) for tensor in read_tensors}
        for tensor in out_tensors:
            if id(tensor) not in known:
                known.add(id(tensor))
                writes.append(self._new_value(tensor, op_index))
        flops = flops_of(func, args, kwargs, out)
        moved = (
            0 if traits.is_view else sum(map(_num_bytes, read_tensors)) + sum(map(_num_bytes, out_tensors))
        )
        returns_number = bool(read_tensors) and not out_tensors and not writes and out is not None
        self.ops.append(
            Op(
                name=str(func),
                call=self._stack[-1],
                reads=reads,
                writes=tuple(writes),
                carried=tuple(carried),
                flops=flops,
                memory_bytes=float(moved),
                reaches_host=returns_number
                or (traits.has_dynamic_shape and _shape_depends_on_data(func, args)),
                is_random=_is_random(traits, args, kwargs),
            )
        )

    def note_host_read(self, name: str, tensor: torch.Tensor) -> None:
        """Records `.tolist()` and relatives, which never reach the dispatcher on the CPU."""
        self.ops.append(Op(name, self._stack[-1], (self.value_of(tensor),), (), (), 0.0, 0.0, True, False))

    def enter(self, path: str, args: Any, *, in_list: bool, has_parameters: bool) -> int:
        """Opens a module call; returns its index."""
        number = self._numbers.get(path, 0)
        self._numbers[path] = number + 1
        arguments = (
            tuple(
                self.value_of(leaf) if isinstance(leaf, torch.Tensor) else None
                for leaf in tree_flatten(args)[0]
            )
            if self._stack
            else ()
        )
        parent = self._stack[-1] if self._stack else -1
        index = len(self.calls)
        first = len(self.ops)
        self.calls.append(
            Call(path, number, parent, first, -1, -1, arguments, (), None, in_list, has_parameters)
        )
        self._stack.append(index)
        return index

    def leave(self, index: int, out: Any) -> None:
        """Closes the innermost module call, which returned `out`."""
        leaves, structure = tree_flatten(out)
        outputs = tuple(self._leaf(leaf) for leaf in leaves)
        self._stack.pop()
        self.calls[index] = replace(
            self.calls[index],
            end_op=len(self.ops), end_call=len(self.calls), outputs=outputs, structure=structure,
        )  # fmt: skip

    def fail(self, path: str) -> None:
        """The innermost module call raised."""
        self.innermost_failure = self.innermost_failure or path

    def knows(self, tensor: torch.Tensor) -> int | None:
        """The tensor's value, None if it was never seen."""
        known = self._current.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def _leaf(self, leaf: Any) -> Leaf:
        if isinstance(leaf, torch.Tensor):
            return Leaf(value=self.value_of(leaf), spec=tensor_spec(leaf))
        return Leaf(constant=leaf) if isinstance(leaf, _PLAIN) else Leaf(constant=None, is_opaque=True)

    def _new_value(self, tensor: torch.Tensor, maker: int) -> int:
        value = len(self.makers)
        self.makers.append(maker)
        self.num_elements.append(tensor.numel())
        reference = weakref.ref(tensor)
        self._current[id(tensor)] = (reference, value)
        self.storages.append(self._join_storage(tensor, reference))
        return value

    def _join_storage(self, tensor: torch.Tensor, reference: weakref.ref[torch.Tensor]) -> int:
        key = storage_key(tensor)
        live = self._live_aliases(tensor)
        if key is None or not live:  # its address may be that of a storage that is gone
            self._num_storages += 1
            members: list[weakref.ref[torch.Tensor]] = []
            index = self._num_storages
        else:
            index, members = self._aliases[key]
        if not any(member() is tensor for member in members):
            members.append(reference)
        if key is not None:
            self._aliases[key] = (index, members)
        return index

    def _live_aliases(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        key = storage_key(tensor)
        if key is None or key not in self._aliases:
            return []
        index, members = self._aliases[key]
        pairs = [(member, member()) for member in members]
        self._aliases[key] = (index, [member for member, alive in pairs if alive is not None])
        return [alive for _, alive in pairs if alive is not None]

    def _write(self, written: list[torch.Tensor], op_index: int) -> tuple[list[int], list[tuple[int, int]]]:
        carried: dict[int, int] = {}
        for tensor in written:
            for alias in (tensor, *self._live_aliases(tensor)):  # the written one first
                old = self.value_of(alias)
                if old not in carried and old not in carried.values():
                    carried[old] = self._new_value(alias, op_index)
        return list(carried.values()), list(carried.items())


def _tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors_in(item)


def _written_tensors(traits: _Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for where in traits.written:
        if isinstance(where, str):
            found += _tensors_in(kwargs.get(where))
        elif where < len(args):
            found += _tensors_in(args[where])
    return found


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shape_depends_on_data(func: Any, args: tuple[Any, ...]) -> bool:
    """Indexing has the tag of a dynamic shape, but only masks make its shape depend on the data."""
    if "aten.index." not in str(func):
        return True
    return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors_in(args[1]))


def _is_random(traits: _Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if not traits.is_random:
        return False
    if not traits.is_attention:
        return True
    dropout = kwargs.get("dropout_p", next((arg for arg in args if type(arg) is float), 0.0))
    return dropout > 0.0

"""Tensors that are still being computed elsewhere: whoever needs their elements waits, and nobody else.

Their shape, dtype, strides and device are known, so they can be handed on, cut, and given to a forward that
comes to them late. A few operations by which pipelines and denoisers hand them on (the sum of a skip
connection and a ControlNet's residual) are put off until the tensors are there: the bottom of a U-Net, which
reads none of those sums, would have to wait for them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from asyncdiff.graph import TensorSpec
from asyncdiff.trace.torch_private import disabled_torch_function, tree_flatten, tree_unflatten, wrapper
from asyncdiff.weights.ownership import dense_spec, empty_tensor, tensor_spec

_aten = torch.ops.aten

# Of what is not awaited they keep a copy, because it may be written to before they are carried out.
_PUT_OFF = frozenset(
    {
        _aten.add.Tensor,
        _aten.alias.default,
        _aten.cat.default,
        _aten.clone.default,
        _aten.detach.default,
        _aten.mul.Tensor,
        _aten.slice.Tensor,
    }
)
_OF_METADATA = frozenset(
    {_aten.empty_like.default, _aten.full_like.default, _aten.ones_like.default, _aten.zeros_like.default}
)


class Delivery:
    """Tensors that come together. `wait` returns them, and is called once, by whoever needs one first, who
    holds `lock` meanwhile; what it raises, everybody is told who needs one."""

    def __init__(
        self, wait: Callable[[], Sequence[torch.Tensor]], lock: threading.RLock | None = None
    ) -> None:
        self._wait: Callable[[], Sequence[torch.Tensor]] | None = wait
        self._lock = lock or threading.RLock()
        self._error: Exception | None = None
        self._promises: list[weakref.ref[_Promise]] = []
        self._listeners: list[Callable[[], None]] = []

    @property
    def is_open(self) -> bool:
        """Whether nobody has needed any of the tensors yet."""
        return self._wait is not None

    def tensors(self, specs: Sequence[TensorSpec], device: torch.device) -> list[torch.Tensor]:
        """Stand-ins for what `wait` will return, which is of these specs and on this device."""
        return [
            AwaitedTensor(self.promise(_Nth(index, spec)), dense_spec(spec), device)
            for index, spec in enumerate(specs)
        ]

    def promise(self, make: Callable[[Sequence[torch.Tensor]], torch.Tensor]) -> _Promise:
        """What will be made of the tensors, in the order of these calls."""
        promise = _Promise(self, make)
        self._promises.append(weakref.ref(promise))
        return promise

    def tell(self, listener: Callable[[], None]) -> None:
        """Call `listener` as soon as the tensors are there; whoever needs them first waits for it too."""
        self._listeners.append(listener)

    def end(self) -> None:
        """Wait, if anybody can still look at the tensors; what goes wrong, they are told when they do."""
        if self.is_open:
            with suppress(Exception):
                self.arrive()

    def arrive(self) -> None:
        """Wait for the tensors, unless they are there, and carry out what was put off."""
        with self._lock:
            if self._wait is not None:
                wait, self._wait = self._wait, None
                try:
                    tensors = wait()
                    for reference in self._promises:
                        promise = reference()
                        if promise is not None:  # else nobody can ask for it any more
                            promise.keep(tensors)
                except BaseException as error:
                    interrupted = RuntimeError("waiting for this tensor was interrupted")
                    self._error = error if isinstance(error, Exception) else interrupted
                    raise
                self._promises.clear()
                listeners, self._listeners = self._listeners, []
                for listener in listeners:
                    listener()
            if self._error is not None:
                raise self._error


class _Promise:
    """One tensor of a delivery, or what an operation makes of some."""

    __slots__ = ("__weakref__", "_make", "_tensor", "delivery")

    def __init__(self, delivery: Delivery, make: Callable[[Sequence[torch.Tensor]], torch.Tensor]) -> None:
        self.delivery = delivery
        self._make: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None = make
        self._tensor: torch.Tensor | None = None

    def keep(self, tensors: Sequence[torch.Tensor]) -> None:
        assert self._make is not None
        self._tensor, self._make = self._make(tensors), None

    @property
    def tensor(self) -> torch.Tensor:
        if self._tensor is None:
            self.delivery.arrive()
        assert self._tensor is not None
        return self._tensor


class _Nth:
    """Takes one tensor of a delivery, laid out as was said of it."""

    def __init__(self, index: int, spec: TensorSpec) -> None:
        self._index = index
        self._spec = dense_spec(spec)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        tensor = tensors[self._index]
        assert (tuple(tensor.shape), str(tensor.dtype)) == (self._spec.shape, f"torch.{self._spec.dtype}")
        if tuple(tensor.stride()) == self._spec.stride:
            return tensor
        return empty_tensor(self._spec, tensor.device).copy_(tensor)


class _PutOff:
    """An operation on promised tensors and others."""

    def __init__(self, operation: Any, leaves: Sequence[Any], structure: Any) -> None:
        self._operation, self._leaves, self._structure = operation, leaves, structure

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        values = [leaf.tensor if isinstance(leaf, _Promise) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(values, self._structure)
        made: torch.Tensor = self._operation(*args, **kwargs)
        return made


class AwaitedTensor(torch.Tensor):
    """Stands in for a tensor that is not there yet, and for ever after hands every operation on to it."""

    _promise: _Promise

    @staticmethod
    def __new__(cls, promise: _Promise, spec: TensorSpec, device: torch.device) -> AwaitedTensor:
        made: AwaitedTensor = wrapper(cls, spec.shape, spec.stride, getattr(torch, spec.dtype), device)
        made._promise = promise
        return made

    __torch_function__ = disabled_torch_function  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        leaves, structure = tree_flatten((args, dict(kwargs or {})))
        awaited = [leaf for leaf in leaves if isinstance(leaf, AwaitedTensor)]
        if func in _OF_METADATA:
            replaced = [
                empty_tensor(tensor_spec(leaf), leaf.device) if isinstance(leaf, AwaitedTensor) else leaf
                for leaf in leaves
            ]
            return _call(func, replaced, structure)
        if func in _PUT_OFF and len({id(each._promise.delivery) for each in awaited}) == 1:
            delivery = awaited[0]._promise.delivery
            put_off = _put_off(func, leaves, structure, awaited[0].device) if delivery.is_open else None
            if put_off is not None:
                make, spec = put_off
                return AwaitedTensor(delivery.promise(make), spec, awaited[0].device)
        return _call(func, [arrived(leaf) for leaf in leaves], structure)

    # What does not come by way of an operation.

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(arrived(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return arrived(self).__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return arrived(self).__reduce_ex__(protocol)

    def __dlpack__(self, **options: Any) -> Any:
        return arrived(self).__dlpack__(**options)

    def numpy(self, *, force: bool = False) -> Any:
        return arrived(self).numpy(force=force)

    def tolist(self) -> Any:
        return arrived(self).tolist()

    def data_ptr(self) -> int:
        return arrived(self).data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return arrived(self).untyped_storage()


def arrived(leaf: Any) -> Any:
    """The tensor that one stands in for, waited for; anything else as it is."""
    return leaf._promise.tensor if isinstance(leaf, AwaitedTensor) else leaf


def open_delivery(tensor: torch.Tensor) -> Delivery | None:
    """What must be waited for before the elements of a tensor can be looked at; None for nothing."""
    if isinstance(tensor, AwaitedTensor) and tensor._promise.delivery.is_open:
        return tensor._promise.delivery
    return None


def _call(func: Any, leaves: Sequence[Any], structure: Any) -> Any:
    args, kwargs = tree_unflatten(list(leaves), structure)
    return func(*args, **kwargs)


def _put_off(
    func: Any, leaves: Sequence[Any], structure: Any, device: torch.device
) -> tuple[_PutOff, TensorSpec] | None:
    """The operation for later and what it will make; None where it must be carried out at once, because a
    copy of what it reads would be laid out in another way, or it mixes devices."""
    kept: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, AwaitedTensor):
            kept.append(leaf._promise)
        elif isinstance(leaf, torch.Tensor):
            if leaf.device != device or dense_spec(tensor_spec(leaf)) != tensor_spec(leaf):
                return None
            kept.append(leaf.clone())
        else:
            kept.append(leaf)
    on_meta = [
        empty_tensor(tensor_spec(leaf), "meta") if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
    ]
    return _PutOff(func, kept, structure), tensor_spec(_call(func, on_meta, structure))

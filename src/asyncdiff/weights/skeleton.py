"""A module without its weights, as bytes: what a stage worker needs to rebuild the denoiser.

The live module is pickled with a persistent id in place of every registered parameter and buffer, so that
LoRA layers, attention processors, configs and patched attributes travel as they are, and tied weights stay
tied.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

from asyncdiff.errors import ConfigurationError
from asyncdiff.graph import TensorSpec
from asyncdiff.weights.attachments import (
    attach,
    default_backend,
    has_attachments,
    portable_state,
    takes_default_backend,
    without_hooks,
)
from asyncdiff.weights.ownership import named_tensors, stand_in, tensor_spec
from asyncdiff.weights.quantised import PART, compose, dressed, dressing, is_dressed, parts_of


@dataclass(frozen=True)
class Skeleton:
    """`payload`: the pickled module. `specs`: name of every registered tensor -> its spec. `parameters`: the
    names that are parameters, and whether they ask for gradients.
    """

    payload: bytes
    specs: dict[str, TensorSpec]
    parameters: dict[str, bool]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(spec.num_bytes for spec in self.specs.values())


def dump_skeleton(module: nn.Module, *, omit: tuple[str, ...] = (), allow_main: bool = False) -> Skeleton:
    """Pickle `module` without its tensors.

    `omit`: instance attributes of `module` itself that stay behind (what `parallelize` installed on it).
    `allow_main`: whether classes and functions of the running script (`__main__`) may be referred to; other
    processes cannot import them. Raises `ConfigurationError` naming what cannot be shipped.
    """
    tensors = dict(named_tensors(module))  # keeps them alive, and with that their ids their own
    names = {id(tensor): name for name, tensor in reversed(tensors.items())}
    buffer = io.BytesIO()
    try:
        _SkeletonPickler(buffer, names, allow_main, module, omit).dump(module)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigurationError(
            f"{type(module).__name__} cannot be shipped to other processes: {error}. Remove what was hooked "
            f"or attached to it (offloading hooks, lambdas), or use runtime='local' to see where it is."
        ) from error
    return Skeleton(
        payload=buffer.getvalue(),
        specs={name: tensor_spec(tensor) for name, tensor in tensors.items()},
        parameters={
            name: tensor.requires_grad for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)
        },
    )


def load_skeleton(
    skeleton: Skeleton, tensors: Mapping[str, torch.Tensor], device: torch.device | str | None = None
) -> nn.Module:
    """The module with the given tensors; the others are on the meta device.

    With `device`, the first parameter, if not given, is a one-element stand-in there, so that the module's
    `.device` answers what it should. A given plain tensor becomes a parameter where the original was one.
    """
    made: dict[str, torch.Tensor] = {}
    first = next(iter(skeleton.specs), "").split(PART)[0]

    def tensor_for(name: str) -> torch.Tensor:
        if name not in made:
            spec = skeleton.specs[name]
            if name in tensors:
                made[name] = tensors[name]
            else:
                made[name] = stand_in(spec, device if name.split(PART)[0] == first else None)
            if name in skeleton.parameters and not isinstance(made[name], nn.Parameter):
                made[name] = nn.Parameter(made[name], requires_grad=skeleton.parameters[name])
        return made[name]

    return _SkeletonUnpickler(io.BytesIO(skeleton.payload), tensor_for).load()


@dataclass(frozen=True)
class _Elements:
    """In the place of a dressed tensor's elements."""

    name: str


class _SkeletonPickler(pickle.Pickler):
    def __init__(
        self,
        file: io.BytesIO,
        names: dict[int, str],
        allow_main: bool,
        root: nn.Module,
        omit: tuple[str, ...],
    ) -> None:
        super().__init__(file, protocol=5)
        self._names = names
        self._allow_main = allow_main
        self._root = root
        self._omit = omit

    def reducer_override(self, obj: Any) -> Any:
        """The root without what stays behind, its own hooks included: they run around the forward in its
        place. Other modules with what is attached to them in a form that can be pickled.

        Taking things off the live module instead would let another thread's call through to weights that are
        elsewhere.
        """
        if isinstance(obj, torch.Tensor):
            return self._reduce_quantised(obj)
        if not isinstance(obj, nn.Module):
            if isinstance(obj, type) or not takes_default_backend(obj):
                return NotImplemented
            make, args, state, *_ = obj.__reduce_ex__(5)
            return make, args, (state or {}) | {"_attention_backend": default_backend()}
        if obj is not self._root and not has_attachments(obj):
            return NotImplemented
        reduced: Any = obj.__reduce_ex__(5)
        make, args, state, *_ = reduced
        if obj is not self._root:
            return make, args, portable_state(obj, state), None, None, attach
        return make, args, without_hooks({k: v for k, v in state.items() if k not in self._omit})

    def _reduce_quantised(self, tensor: torch.Tensor) -> Any:
        """A parameter that is more than its elements, of which the skeleton has none."""
        if parts_of(tensor):
            _, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            shape, stride = tuple(tensor.shape), tuple(tensor.stride())
            return compose, (
                type(tensor), parts_of(tensor), context, shape, stride, tensor.requires_grad
            )  # fmt: skip
        if not is_dressed(tensor) or id(tensor) not in self._names:
            return NotImplemented
        elements = _Elements(self._names[id(tensor)])
        return dressed, (type(tensor), elements, tensor.requires_grad, dressing(tensor))

    def persistent_id(self, obj: Any) -> str | None:
        if isinstance(obj, _Elements):
            return obj.name
        if isinstance(obj, torch.Tensor):
            return None if is_dressed(obj) else self._names.get(id(obj))
        if not self._allow_main and isinstance(obj, type | FunctionType) and obj.__module__ == "__main__":
            raise ConfigurationError(
                f"{obj.__qualname__} is defined in the running script (__main__), which worker processes do "
                f"not import. Move it to a module of its own and import it from there."
            )
        return None


class _SkeletonUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensor_for: Callable[[str], torch.Tensor]) -> None:
        super().__init__(file)
        self._tensor_for = tensor_for

    def persistent_load(self, pid: str) -> torch.Tensor:
        return self._tensor_for(pid)

"""The inputs of one denoiser call: named, flattened, and rebuilt elsewhere from the part that is needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from asyncdiff.errors import UnsupportedDenoiserError
from asyncdiff.graph import TensorSpec
from asyncdiff.trace.tensors import MakePlaceholder, zero_placeholder
from asyncdiff.trace.torch_private import Structure, tree_flatten_named, tree_unflatten
from asyncdiff.weights.ownership import tensor_spec

# Python ints under these names change from call to call as floats do: a custom loop may pass `int(t)`.
TIMESTEP_NAMES = ("timestep", "timesteps", "t")


@dataclass(frozen=True)
class Inputs:
    """One call's denoiser inputs, flattened.

    `names[i]` is the dotted name of `leaves[i]` (`"sample"`, `"added_cond_kwargs.text_embeds"`,
    `"down_block_additional_residuals.3"`); `structure` describes the nesting and pickles.
    """

    names: tuple[str, ...]
    leaves: tuple[Any, ...]
    structure: Structure

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensor leaves by name."""
        return self._tensors

    @cached_property
    def _tensors(self) -> Mapping[str, torch.Tensor]:
        return {
            name: leaf
            for name, leaf in zip(self.names, self.leaves, strict=True)
            if isinstance(leaf, torch.Tensor)
        }

    def floats(self) -> dict[str, float]:
        """The Python numbers that may change without a new analysis: floats, and a timestep given as an
        int."""
        return {
            name: leaf
            for name, leaf in zip(self.names, self.leaves, strict=True)
            if is_free_number(name, leaf)
        }

    @property
    def latents(self) -> str:
        """Name of the first tensor argument; `UnsupportedDenoiserError` if there is none."""
        for name, leaf in zip(self.names, self.leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                return name
        raise UnsupportedDenoiserError("The denoiser was called without any tensor argument.")

    def key(self) -> Hashable:
        """Equal for calls that one analysis covers: structure, shapes, dtypes, and what is neither tensor nor
        float."""
        leaves = tuple(_leaf_key(name, leaf) for name, leaf in zip(self.names, self.leaves, strict=True))
        return (repr(self.structure), self.names, leaves)

    def spec(self) -> InputsSpec:
        """The picklable description from which another process rebuilds the call."""
        latents_device = self.tensors()[self.latents].device
        leaves = tuple(
            _leaf_spec(name, leaf, latents_device) for name, leaf in zip(self.names, self.leaves, strict=True)
        )
        return InputsSpec(self.names, leaves, self.structure)

    def rebuild(self, leaves: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Keyword arguments with containers of their own (a forward that pops from a list leaves ours alone);
        `leaves` replaces some by name."""
        replaced = leaves or {}
        values = [replaced.get(name, leaf) for name, leaf in zip(self.names, self.leaves, strict=True)]
        return tree_unflatten(values, self.structure)


@dataclass(frozen=True)
class TensorLeaf:
    """A tensor argument. `follows_device`: it lives where the latents live, else on the CPU."""

    spec: TensorSpec
    follows_device: bool


@dataclass(frozen=True)
class NumberLeaf:
    """A Python number shipped with every call; `recorded` is the one the analysis saw."""

    recorded: float


@dataclass(frozen=True)
class ConstantLeaf:
    """Anything else: part of the key, the same in every call of this structure."""

    value: Any


@dataclass(frozen=True)
class InputsSpec:
    """What is needed to rebuild a call's keyword arguments in another process. Small and picklable."""

    names: tuple[str, ...]
    leaves: tuple[TensorLeaf | NumberLeaf | ConstantLeaf, ...]
    structure: Structure

    def tensor_names(self) -> tuple[str, ...]:
        return tuple(
            name for name, leaf in zip(self.names, self.leaves, strict=True) if isinstance(leaf, TensorLeaf)
        )

    def rebuild(
        self,
        tensors: Mapping[str, torch.Tensor],
        floats: Mapping[str, float],
        device: torch.device | str,
        placeholder: MakePlaceholder = zero_placeholder,
    ) -> dict[str, Any]:
        """Keyword arguments for the denoiser's forward, in fresh containers.

        Tensors that are not in `tensors` become placeholders of the recorded shape, stride and dtype on
        `device` (on the CPU those that did not live beside the latents); numbers not in `floats` keep their
        recorded value.
        """
        values = [
            _rebuild_leaf(name, leaf, tensors, floats, torch.device(device), placeholder)
            for name, leaf in zip(self.names, self.leaves, strict=True)
        ]
        return tree_unflatten(values, self.structure)


def flatten_inputs(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
    """Binds a call to the signature of `forward` (bound, or a class's function) so that everything has a
    name.

    Positional arguments become keywords, a `**kwargs` catch-all is flattened in. TypeError if the call does
    not fit the signature; `UnsupportedDenoiserError` if it uses `*args` or has no tensor.
    """
    # Kept for functions: to read and bind a signature takes 0.3 ms, and this is done at every call.
    bind = _bound_once if inspect.isfunction(forward) else _bound
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    named = {name: given[key] for name, key in bind(forward, len(args), tuple(kwargs)).items()}
    names, leaves, structure = tree_flatten_named(named)
    inputs = Inputs(tuple(names), tuple(leaves), structure)
    inputs.latents  # noqa: B018  # refuses a call without tensors here, not later
    return inputs


def is_free_number(name: str, leaf: Any) -> bool:
    """Whether a non-tensor leaf may change from call to call within one analysis."""
    if isinstance(leaf, bool):
        return False
    return isinstance(leaf, float) or (isinstance(leaf, int) and name in TIMESTEP_NAMES)


def _bound(forward: Callable[..., Any], num_args: int, keywords: tuple[str, ...]) -> dict[str, int | str]:
    """Name of every argument of such a call -> its position or keyword, in the order of the signature."""
    signature = _signature_without_self(forward)
    bound = signature.bind(*range(num_args), **{keyword: keyword for keyword in keywords})
    named: dict[str, int | str] = {}
    for name, key in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(key)
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise UnsupportedDenoiserError(
                f"The denoiser's forward takes `{name}` by position only; every argument must have a name."
            )
        else:
            named[name] = key
    return named


_bound_once = lru_cache(maxsize=64)(_bound)


def _signature_without_self(forward: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(forward)
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].name == "self" and not inspect.ismethod(forward):
        parameters = parameters[1:]
    return signature.replace(parameters=parameters)


def _leaf_key(name: str, leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        stride = None if leaf.is_contiguous() else tuple(leaf.stride())
        return ("tensor", tuple(leaf.shape), stride, str(leaf.dtype), leaf.device.type)
    if is_free_number(name, leaf):
        return ("number", type(leaf).__name__)
    try:
        hash(leaf)
    except TypeError:
        return (type(leaf).__qualname__, repr(leaf))
    return (type(leaf).__qualname__, leaf)


def _leaf_spec(name: str, leaf: Any, latents_device: torch.device) -> TensorLeaf | NumberLeaf | ConstantLeaf:
    if isinstance(leaf, torch.Tensor):
        return TensorLeaf(tensor_spec(leaf), leaf.device == latents_device)
    if is_free_number(name, leaf):
        return NumberLeaf(leaf)
    return ConstantLeaf(leaf)


def _rebuild_leaf(
    name: str,
    leaf: TensorLeaf | NumberLeaf | ConstantLeaf,
    tensors: Mapping[str, torch.Tensor],
    floats: Mapping[str, float],
    device: torch.device,
    placeholder: MakePlaceholder,
) -> Any:
    if isinstance(leaf, TensorLeaf):
        if name in tensors:
            return tensors[name]
        return placeholder(leaf.spec, device if leaf.follows_device else torch.device("cpu"))
    if isinstance(leaf, NumberLeaf):
        return floats.get(name, leaf.recorded)
    return leaf.value

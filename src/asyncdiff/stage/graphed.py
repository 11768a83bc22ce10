"""Modules of a stage as CUDA graphs: Python launches all kernels of a call at once, not one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import nn

from asyncdiff.trace.torch_private import Structure, storage_key, tree_flatten, tree_unflatten
from asyncdiff.weights.ownership import tensor_spec

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Any]], tuple[Replay, Any]]
"""Runs a function once and notes what it does on the device: how to do that again, in the same memory, and
what the function has returned."""

EAGER_CALLS = 2
"""Of each kind of call, before it is captured: libraries choose their kernels in them."""

_MOST_GRAPHS = 16
_MOST_KINDS = 256  # a number that changes at every step makes a kind of every call
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class CudaCapture:
    """Captures CUDA graphs on a device, all in one pool of memory.

    They may share it in whatever order they are replayed, because what one returns is copied before the next
    one runs on the same stream. Other threads may use the device meanwhile (NCCL's does).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, run: Callable[[], Any]) -> tuple[Replay, Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                returned = run()
        return graph.replay, returned


class GraphedForward:
    """The instance-level `forward` of a module, below the stub it may get.

    `previous` is the instance-level forward it replaced, None if the class's own. A kind of call is its
    structure, the shapes of its tensors and whatever else it is given. The first calls of a kind run as they
    are; then it is captured. Never captured are calls with a tensor on another device (the host's would be
    read once and for all), calls that write into a tensor they are given or return it, and those with
    arguments of unknown types. `is_cut`: stubs are inside the module, which runs as it is.
    """

    def __init__(self, module: nn.Module, device: torch.device, capture: Capture) -> None:
        self.previous: Callable[..., Any] | None = vars(module).get("forward")
        self._inner: Callable[..., Any] = module.forward
        self._name = type(module).__name__
        self._device = device
        self._capture = capture
        self._graphs: dict[Hashable, _Graph] = {}
        self._calls: dict[Hashable, int | None] = {}  # None: never to be captured
        self.is_cut = False

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_cut:
            return self._inner(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        if not all(map(self._may_be_captured, leaves)):
            return self._inner(*args, **kwargs)
        kind = (repr(structure), tuple(map(_kind, leaves)))
        if kind not in self._graphs:
            number = self._calls.get(kind, 0 if len(self._calls) < _MOST_KINDS else None)
            if number is None or len(self._graphs) >= _MOST_GRAPHS:
                return self._inner(*args, **kwargs)
            if number < EAGER_CALLS:
                returned, may_be_captured = self._run_and_look(leaves, args, kwargs)
                self._calls[kind] = number + 1 if may_be_captured else None
                return returned
            self._graphs[kind] = self._captured(leaves, structure)
        return self._graphs[kind].run(leaves)

    def _may_be_captured(self, leaf: Any) -> bool:
        if isinstance(leaf, torch.Tensor):
            return leaf.device == self._device
        return isinstance(leaf, _CONSTANTS)

    def _run_and_look(
        self, leaves: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, bool]:
        """Run a call as it is, and whether it leaves what it is given alone. Waits for the device."""
        given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        before = [tensor.clone() for tensor in given]
        returned = self._inner(*args, **kwargs)
        memory = {storage_key(tensor) for tensor in given}
        is_passed_on = any(
            storage_key(leaf) in memory
            for leaf in tree_flatten(returned)[0]
            if isinstance(leaf, torch.Tensor)
        )
        return returned, not is_passed_on and all(map(torch.equal, before, given))

    def _captured(self, leaves: Sequence[Any], structure: Structure) -> _Graph:
        try:
            return _Graph(self._inner, leaves, structure, self._capture)
        except RuntimeError as error:
            raise RuntimeError(
                f"A call of {self._name} cannot be captured as a CUDA graph: {error}\n"
                "Leave cuda_graphs=True out."
            ) from error


class _Graph:
    """One kind of call, captured on memory of its own."""

    def __init__(
        self, forward: Callable[..., Any], leaves: Sequence[Any], structure: Structure, capture: Capture
    ) -> None:
        # Memory made in inference mode could not be written to outside it.
        with torch.inference_mode(False), torch.no_grad():
            held = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(held, structure)
            self._replay, returned = capture(lambda: forward(*args, **kwargs))
        self._held = held
        self._returned, self._structure = tree_flatten(returned)

    def run(self, leaves: Sequence[Any]) -> Any:
        """What the call returns for other tensors, in new memory."""
        for held, given in zip(self._held, leaves, strict=True):
            if isinstance(held, torch.Tensor):
                held.copy_(given)
        self._replay()
        returned = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self._returned]
        return tree_unflatten(returned, self._structure)


def _kind(leaf: Any) -> Hashable:
    return tensor_spec(leaf) if isinstance(leaf, torch.Tensor) else (type(leaf), leaf)

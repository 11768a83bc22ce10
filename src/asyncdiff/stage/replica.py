"""A copy of the denoiser that runs one stage: its own forward, with stubs in the place of foreign blocks."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from asyncdiff.graph import Atom, TensorSpec
from asyncdiff.stage.compiled import compile_again, compile_block
from asyncdiff.stage.graphed import CudaCapture, GraphedForward
from asyncdiff.stage.spec import Action, Argument, Capture, Constant, Own, Received, Run, StageSpec, Stub
from asyncdiff.trace.tensors import MakePlaceholder, no_gradients, zero_placeholder
from asyncdiff.trace.torch_private import tree_flatten, tree_unflatten
from asyncdiff.weights.ownership import empty_tensor

ReadLeaf = Callable[[int, Atom, torch.Tensor | None], torch.Tensor]
EmitLeaf = Callable[[Atom, torch.Tensor], None]


@dataclass(frozen=True)
class BlockExecution:
    """How a stage runs its own blocks: `compiled` by `torch.compile`, captured and replayed as `cuda_graphs`,
    both, or as they are."""

    compiled: bool = False
    cuda_graphs: bool = False


AS_THEY_ARE = BlockExecution()


class StageReplica:
    """Takes ownership of a copy of the denoiser that holds one stage's weights (foreign ones may be on meta).

    Nothing happens until `prepare`; `remove` takes every stub out again. `device` is where placeholders and
    placeholder inputs are made. `forward` is the denoiser's own forward where `module.forward` has been
    replaced. `buffer` makes the memory for leaves that are filled in later.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        device: torch.device | str = "cpu",
        forward: Callable[..., Any] | None = None,
        placeholder: MakePlaceholder = zero_placeholder,
        buffer: MakePlaceholder = empty_tensor,
        execution: BlockExecution = AS_THEY_ARE,
    ) -> None:
        self.module = module
        self.device = torch.device(device)
        self._forward = forward or module.forward
        self._specs: dict[Hashable, StageSpec] = {}
        self._stubs: dict[str, StubForward] = {}
        self._compiled = compile_again(module)
        self._graphed: dict[str, GraphedForward] = {}
        self._execution = execution
        self._capture = CudaCapture(self.device)
        self._pass = _Pass(_PlaceholderPool(self.device, placeholder), buffer)

    def prepare(self, key: Hashable, spec: StageSpec) -> None:
        """Installs the stubs for an input structure (or replaces those of `key`). Several keys live side by
        side."""
        self.discard(key)
        self._specs[key] = spec
        if self._execution.compiled:
            self._compile(spec)
        if self._execution.cuda_graphs:
            self._graph(spec)
        for path, actions in spec.actions:
            if all(map(_is_plain, actions)) and self._is_within_whole(path):
                continue
            if path not in self._stubs:
                self._stubs[path] = _install(self.module.get_submodule(path), path, self._pass)
            self._stubs[path].actions[key] = actions
        for path, compiled in self._compiled.items():
            compiled.is_cut = self._is_cut(path)
        for path, graphed in self._graphed.items():
            graphed.is_cut = self._is_cut(path)

    def _compile(self, spec: StageSpec) -> None:
        """The stage's own modules, unless they, what they are in or what is in them is compiled already."""
        for path in self._own_modules(spec, self._compiled):
            self._compiled[path] = compile_block(self.module.get_submodule(path))

    def _graph(self, spec: StageSpec) -> None:
        """The stage's own modules, compiled or not."""
        for path in self._own_modules(spec, self._graphed):
            module = self.module.get_submodule(path)
            self._graphed[path] = GraphedForward(module, self.device, self._capture)
            vars(module)["forward"] = self._graphed[path]

    def _own_modules(self, spec: StageSpec, taken: Collection[str]) -> Iterator[str]:
        """The largest that run as a whole on this stage, but for those that have to do with one in `taken`,
        which may grow meanwhile."""
        acting = {path for path, actions in spec.actions if not all(map(_is_plain, actions))}
        for path, actions in spec.actions:
            if any(isinstance(action, Own) for action in actions):
                largest = path if path in acting else _largest_without(acting, path, self.module)
                if not any(_contains(largest, other) or _contains(other, largest) for other in taken):
                    yield largest

    def _is_within_whole(self, path: str) -> bool:
        return any(_contains(whole, path) and whole != path for whole in (*self._compiled, *self._graphed))

    def _is_cut(self, path: str) -> bool:
        return any(stub.startswith(path + ".") for stub in self._stubs)

    def discard(self, key: Hashable) -> None:
        """Forgets one input structure; nothing happens if it is not there."""
        if self._specs.pop(key, None) is not None:
            self._pass.placeholders.clear()  # perhaps of no other's shapes; those that are, are made again
        for stub in self._stubs.values():
            stub.actions.pop(key, None)

    @property
    def takes_plain_tensors(self) -> bool:
        """Whether all that it is given must be there already: blocks are compiled or captured."""
        return bool(self._compiled or self._graphed)

    def spec(self, key: Hashable) -> StageSpec:
        """The spec prepared under `key`; KeyError if there is none."""
        return self._specs[key]

    def run(
        self,
        key: Hashable,
        tensors: Mapping[str, torch.Tensor],
        floats: Mapping[str, float],
        read: ReadLeaf,
        emit: EmitLeaf,
    ) -> list[torch.Tensor] | None:
        """One forward of this stage.

        `tensors` and `floats` are the denoiser inputs it needs, by name. `read(segment, atom, out)` gives a
        foreign leaf to own segment `segment`, once per atom, in the memory of `out` if that is not None;
        `emit(atom, tensor)` takes an own leaf the
        moment its block has returned. Returns the tensor leaves of the output, or None for a stage that ends
        before it.
        """
        spec = self._specs[key]
        # A constant input may be kept from step to step: a forward that writes into it gets a copy.
        given = {
            name: tensor.clone() if name in spec.written_inputs else tensor
            for name, tensor in tensors.items()
        }
        kwargs = spec.inputs.rebuild(given, floats, self.device, self._pass.placeholders)
        self._pass.begin(key, read, emit)
        try:
            with no_gradients():
                out = self._forward(**kwargs)
        except _StageDone:
            return None
        finally:
            self._pass.end()
        return [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor)]

    def remove(self) -> None:
        """The module as it was: every forward restored, placeholders freed."""
        for path, stub in self._stubs.items():
            _uninstall(self.module.get_submodule(path), stub)
        for path, graphed in self._graphed.items():
            _uninstall(self.module.get_submodule(path), graphed)
        for path in self._compiled:
            vars(self.module.get_submodule(path)).pop("forward", None)
        self._stubs.clear()
        self._compiled.clear()
        self._graphed.clear()
        self._specs.clear()
        self._pass.placeholders.clear()


def _is_plain(action: Action) -> bool:
    """Whether the module only runs its own forward."""
    return isinstance(action, Run) or (
        isinstance(action, Own) and not (action.captures or action.is_last or action.fills)
    )


def _contains(path: str, other: str) -> bool:
    """Whether a module is another or holds it."""
    return (other + ".").startswith(path + ".")


def _largest_without(acting: Collection[str], path: str, root: nn.Module) -> str:
    """The largest module around `path`, the root excepted, in which none of `acting` is."""
    largest, parts = path, path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        around = ".".join(parts[:length])
        if any(_contains(around, other) for other in acting):
            break
        if not isinstance(
            root.get_submodule(around), nn.ModuleList | nn.ModuleDict
        ):  # these are never called
            largest = around
    return largest


class _StageDone(BaseException):
    """Ends the forward after the stage's last block. No `Exception`, so that no model catches it by
    accident."""


class _PlaceholderPool:
    """One buffer per (shape, stride, dtype, device), shared by all stubs: nothing reads what is in it."""

    def __init__(self, device: torch.device, make: MakePlaceholder) -> None:
        self.device = device
        self._make = make
        self._buffers: dict[tuple[TensorSpec, torch.device], torch.Tensor] = {}

    def __call__(self, spec: TensorSpec, device: torch.device | None = None) -> torch.Tensor:
        where = (spec, device or self.device)
        if where not in self._buffers:
            self._buffers[where] = self._make(*where)
        return self._buffers[where]

    def clear(self) -> None:
        self._buffers.clear()


@dataclass
class _Pass:
    """The forward that is running: which input structure, how often each module was called, what was
    received."""

    placeholders: _PlaceholderPool
    buffer: MakePlaceholder
    key: Hashable = None
    is_running: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    received: dict[Atom, torch.Tensor] = field(default_factory=dict)
    read: ReadLeaf | None = None
    emit: EmitLeaf | None = None

    def begin(self, key: Hashable, read: ReadLeaf, emit: EmitLeaf) -> None:
        # No assertion that the last one has ended: Ctrl-C may have come before or within `end`.
        self.counts.clear()
        self.received.clear()
        self.key, self.read, self.emit, self.is_running = key, read, emit, True

    def end(self) -> None:
        self.is_running, self.read, self.emit = False, None, None
        self.counts.clear()
        self.received.clear()

    def leaf(self, fill: Received) -> torch.Tensor:
        """A foreign leaf: read once per forward, and one object wherever it is replayed, or in-place glue on
        the one would not be seen in the other."""
        if fill.atom not in self.received:
            if fill.later is not None:
                self.received[fill.atom] = self.buffer(fill.later, self.placeholders.device)
            else:
                assert self.read is not None
                tensor = self.read(fill.segment, fill.atom, None)
                self.received[fill.atom] = tensor.clone() if fill.clone else tensor
        return self.received[fill.atom]

    def fill(self, fill: Received) -> None:
        """Wait for a leaf whose memory has been replayed."""
        if fill.atom in self.received:
            assert self.read is not None
            self.read(fill.segment, fill.atom, self.received[fill.atom])


class StubForward:
    """The instance-level `forward` of a module that has something else to do than its own on this stage.

    `previous` is the instance-level forward it replaced (a hook's), None if the class's own. It holds no
    bound method, so it pickles and copies with its module.
    """

    def __init__(self, module: nn.Module, path: str, running: _Pass) -> None:
        self.module = module
        self.path = path
        self.running = running
        self.previous: Callable[..., Any] | None = vars(module).get("forward")
        self.actions: dict[Hashable, tuple[Action, ...]] = {}

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._inner)

    @property
    def _inner(self) -> Callable[..., Any]:
        if self.previous is not None:
            return self.previous
        return type(self.module).forward.__get__(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        action = self._next_action()
        if isinstance(action, Run):
            return self._inner(*args, **kwargs)
        if isinstance(action, Stub):
            return self._replay(action, args, kwargs)
        out = self._inner(*args, **kwargs)
        if action.captures:
            self._capture(action.captures, out)
        if action.is_last:
            raise _StageDone
        for fill in action.fills:
            self.running.fill(fill)
        return out

    def _next_action(self) -> Action:
        actions = self.actions.get(self.running.key) if self.running.is_running else None
        if actions is None:
            return Run()
        number = self.running.counts[self.path]
        self.running.counts[self.path] += 1
        if number >= len(actions):
            raise RuntimeError(
                f"Module {self.path!r} was called {number + 1} times where the trace saw "
                f"{len(actions)} calls: the denoiser's forward took another way than when it was traced."
            )
        return actions[number]

    def _replay(self, stub: Stub, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        passed: list[Any] = []
        leaves: list[Any] = []
        for fill in stub.leaves:
            if isinstance(fill, Received):
                leaves.append(self.running.leaf(fill))
            elif isinstance(fill, Argument):
                passed = passed or tree_flatten((args, kwargs))[0]
                leaves.append(passed[fill.index])
            elif isinstance(fill, Constant):
                leaves.append(fill.value)
            else:
                leaves.append(self.running.placeholders(fill.spec))
        return tree_unflatten(leaves, stub.structure)

    def _capture(self, captures: tuple[Capture, ...], out: Any) -> None:
        leaves = tree_flatten(out)[0]
        assert self.running.emit is not None
        for capture in captures:
            tensor = leaves[capture.leaf]
            self.running.emit(capture.atom, tensor.clone() if capture.clone else tensor)


def _install(module: nn.Module, path: str, running: _Pass) -> StubForward:
    stub = StubForward(module, path, running)
    vars(module)["forward"] = stub
    return stub


def _uninstall(module: nn.Module, ours: StubForward | GraphedForward) -> None:
    if vars(module).get("forward") is not ours:
        return  # somebody replaced it after us: theirs to keep
    if ours.previous is None:
        del vars(module)["forward"]
    else:
        vars(module)["forward"] = ours.previous

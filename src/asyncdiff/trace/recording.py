"""What one recording forward of the denoiser leaves behind: operations in SSA form and the tree of module
calls.

A value is one version of one tensor object: an in-place write makes a new value for the tensor and for every
live alias of its storage. Keyed by object, not by storage: two outputs of a block may be views of one tensor
and are two values. No torch here but in the structures (pytree specs) of outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from asyncdiff.graph import BlockKey, TensorSpec
from asyncdiff.trace.inputs import InputsSpec
from asyncdiff.trace.torch_private import Structure


def paths_above(name: str) -> Iterator[str]:
    """The modules that a dotted name lies in, itself not: `"a.b.weight"` -> `"a"`, `"a.b"`."""
    end = name.find(".")
    while end >= 0:
        yield name[:end]
        end = name.find(".", end + 1)


@dataclass(frozen=True, slots=True)
class Op:
    """One operator call, made inside module call number `call`.

    `reads`: values whose data it uses. `writes`: values it makes. `carried`: (old, new) for what an in-place
    write changes: the written tensor, then its live aliases; the new ones are in `writes` too.
    `reaches_host`: the data reach Python or decide a shape. `is_random`: draws random numbers.
    """

    name: str
    call: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    carried: tuple[tuple[int, int], ...]
    flops: float
    memory_bytes: float
    reaches_host: bool
    is_random: bool

    @property
    def touches_data(self) -> bool:
        """Whether it looks at elements, or writes any: all but views, which only describe memory anew."""
        return self.memory_bytes > 0 or bool(self.carried) or self.reaches_host


@dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of what a call returned: a tensor (`value`, `spec`), or a `constant`.

    `is_opaque`: an object that pytree cannot look into; it may hide tensors.
    """

    value: int | None = None
    spec: TensorSpec | None = None
    constant: Any = None
    is_opaque: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one module: `ops[first_op:end_op]` ran inside it, `calls[index + 1:end_call]` are below it.

    `number` counts the calls of the same path. `arguments`: the value of every argument leaf (positional,
    then keyword), None for what is no tensor. `in_list`: the module is an element of a `ModuleList`.
    """

    path: str
    number: int
    parent: int
    first_op: int
    end_op: int
    end_call: int
    arguments: tuple[int | None, ...]
    outputs: tuple[Leaf, ...]
    structure: Structure | None
    in_list: bool
    has_parameters: bool

    @property
    def key(self) -> BlockKey:
        return BlockKey(self.path, self.number)


@dataclass(frozen=True)
class ModelTensor:
    """A parameter or buffer: all dotted names it has (more than one when tied) and its size."""

    names: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True)
class Recording:
    """One forward of one denoiser with one structure of inputs. `calls[0]` is the denoiser itself.

    Per value: `makers` (index of the operation, -1 for what was there before), `num_elements`, `storages` (an
    index that two values share if they alias), `input_of` and `tensor_of` (name of the denoiser input;
    position in `tensors`). `mode`: `"fake"`, `"mixed"`, `"hollow"` or `"real"`, the tensors it was made with
    (`record`).
    `kept`: (module path, attribute, value) of tensors that the forward left on modules.
    """

    calls: tuple[Call, ...]
    ops: tuple[Op, ...]
    makers: tuple[int, ...]
    storages: tuple[int, ...]
    num_elements: tuple[int, ...]
    input_of: Mapping[int, str]
    tensor_of: Mapping[int, int]
    tensors: tuple[ModelTensor, ...]
    inputs: InputsSpec
    latents: tuple[str, ...]
    mode: str
    kept: tuple[tuple[str, str, int], ...] = field(default=())

    @cached_property
    def call_of(self) -> dict[BlockKey, int]:
        return {call.key: index for index, call in enumerate(self.calls)}

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Direct children of every call, in execution order."""
        found: list[list[int]] = [[] for _ in self.calls]
        for index, call in enumerate(self.calls[1:], start=1):
            found[call.parent].append(index)
        return tuple(tuple(children) for children in found)

    @cached_property
    def parameter_bytes(self) -> dict[str, int]:
        """Module path -> bytes of the parameters and buffers below it; a tied one counts once."""
        found: dict[str, int] = {}
        for tensor in self.tensors:
            for path in {path for name in tensor.names for path in paths_above(name)}:
                found[path] = found.get(path, 0) + tensor.num_bytes
        return found

    @cached_property
    def work(self) -> tuple[tuple[float, float], ...]:
        """(FLOPs, bytes read and written) of every call, all below it included."""
        flops, moved = [0.0], [0.0]
        for op in self.ops:
            flops.append(flops[-1] + op.flops)
            moved.append(moved[-1] + op.memory_bytes)
        return tuple(
            (flops[call.end_op] - flops[call.first_op], moved[call.end_op] - moved[call.first_op])
            for call in self.calls
        )

    @cached_property
    def depends_on_latents(self) -> tuple[bool, ...]:
        """Per value: whether the latents flow into it."""
        return self.depends_on(self.latents)

    def depends_on(self, inputs: Collection[str]) -> tuple[bool, ...]:
        """Per value: whether any of these denoiser inputs flows into it."""
        tainted = [self.input_of.get(value) in inputs for value in range(len(self.makers))]
        for op in self.ops:
            reads_latents = any(tainted[value] for value in op.reads)
            for value in op.writes:
                tainted[value] |= reads_latents
            for old, new in op.carried:
                tainted[new] |= tainted[old]
        return tuple(tainted)

    @cached_property
    def steering_inputs(self) -> frozenset[str]:
        """Inputs whose values, not only shapes, the recorded forward depended on: they reached Python or
        decided a shape (Lumina2 takes lengths from its mask). Another value needs another recording.

        Not those that only do so together with activations (a mixture of experts sorts its tokens): that is
        the affair of the block that does it, at every step anew.
        """
        if not any(op.reaches_host for op in self.ops):
            return frozenset()
        flows: list[frozenset[str]] = [frozenset()] * len(self.makers)
        for value, name in self.input_of.items():
            flows[value] = frozenset((name,))
        steering: set[str] = set()
        for op in self.ops:
            read = frozenset[str]().union(*(flows[value] for value in op.reads))
            if op.reaches_host and not any(self.depends_on_latents[value] for value in op.reads):
                steering |= read
            for value in op.writes:
                flows[value] = read
            for old, new in op.carried:
                flows[new] = read | flows[old]
        return frozenset(steering)

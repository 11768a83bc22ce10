"""What each block reads, for one choice of blocks: a pure function of the recording.

Sources (denoiser inputs, parameters, leaves of blocks) are bits of Python integers, so that the union of what
flows into a value is one `|`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from asyncdiff.graph import Atom
from asyncdiff.trace.recording import Op, Recording


@dataclass(frozen=True)
class Problem:
    """Why these blocks cannot be separated: what `call` does, in words for the user."""

    call: int
    reason: str


@dataclass(frozen=True)
class Provenance:
    """What flows where, for blocks that are the calls `blocks` (none inside another, in execution order).

    `home`: per operation the position of its block, -1 for glue. `atoms`: every tensor leaf that a block
    makes; `atom_of`: value -> position in `atoms`. `reads`, `tensors`, `inputs`: per block, positions of the
    atoms and model tensors and names of the inputs it uses, directly or through glue; `glue_uses`: per
    block, atom -> how many blocks have ended when glue first touches the atom's data on the way to the
    block; without those that glue at most makes views of. `output_*`: the same for what the denoiser
    returns. `glue_tensors`: model tensors that glue uses. `steering_inputs`: inputs whose values reach Python
    or decide a shape. `mutated`: atoms whose storage is written after their block returned;
    `written_inputs`: inputs whose storage is written at all.
    """

    blocks: tuple[int, ...]
    home: tuple[int, ...]
    atoms: tuple[Atom, ...]
    atom_of: dict[int, int]
    reads: tuple[tuple[int, ...], ...]
    tensors: tuple[frozenset[int], ...]
    inputs: tuple[frozenset[str], ...]
    glue_uses: tuple[dict[int, int], ...]
    output_atoms: tuple[int, ...]
    output_inputs: frozenset[str]
    output_glue_uses: dict[int, int]
    glue_tensors: frozenset[int]
    steering_inputs: frozenset[str]
    mutated: frozenset[int]
    written_inputs: frozenset[str]
    problems: tuple[Problem, ...]


def provenance(recording: Recording, blocks: Iterable[int]) -> Provenance:
    """Follows every value through glue from its sources to the blocks that use it."""
    return _Walk(recording, tuple(sorted(blocks))).result()


class _Walk:
    def __init__(self, recording: Recording, blocks: tuple[int, ...]) -> None:
        self.recording = recording
        self.blocks = blocks
        self.home = _homes(recording, blocks)
        self.input_names = sorted(set(recording.input_of.values()))
        self.latents = sum(1 << self.input_names.index(name) for name in recording.latents)
        self.first_tensor = len(self.input_names)
        self.first_atom = self.first_tensor + len(recording.tensors)
        self.problems: list[Problem] = []
        self.atoms: list[Atom] = []
        self.atom_of: dict[int, int] = {}
        self._name_atoms()
        self.flows = self._sources()
        self.reads = [0] * len(blocks)
        self.num_ended = 0
        self.touched: dict[int, dict[int, int]] = {}  # value that glue made -> atom -> `glue_uses`
        self.glue_uses: list[dict[int, int]] = [{} for _ in blocks]
        self.glue = 0
        self.steering = 0
        self.mutated: set[int] = set()
        self.lasting_storages = {
            recording.storages[value] for value in (*recording.input_of, *recording.tensor_of)
        }
        self.used = _used_values(recording)
        self.leaves_by_storage: dict[int, list[int]] = {}
        for value in self.atom_of:
            self.leaves_by_storage.setdefault(recording.storages[value], []).append(value)

    def result(self) -> Provenance:
        for index, op in enumerate(self.recording.ops):
            self._visit(index, op.call)
        output = 0
        output_touched: dict[int, int] = {}
        for leaf in self.recording.calls[0].outputs:
            if leaf.value is not None:
                output |= self._flow(leaf.value, reader=-1, call=0)
                _keep_first(output_touched, self.touched.get(leaf.value, {}))
            elif leaf.is_opaque:
                self.problems.append(Problem(0, "returns an object that hides its tensors from pytree"))
        self._check_kept()
        return Provenance(
            blocks=self.blocks,
            home=self.home,
            atoms=tuple(self.atoms),
            atom_of=self.atom_of,
            reads=tuple(tuple(self._atoms_in(mask)) for mask in self.reads),
            tensors=tuple(frozenset(self._tensors_in(mask)) for mask in self.reads),
            inputs=tuple(frozenset(self._inputs_in(mask)) for mask in self.reads),
            glue_uses=tuple(self.glue_uses),
            output_atoms=tuple(self._atoms_in(output)),
            output_inputs=frozenset(self._inputs_in(output)),
            output_glue_uses=output_touched,
            glue_tensors=frozenset(self._tensors_in(self.glue | output)),
            steering_inputs=frozenset(self._inputs_in(self.steering)),
            mutated=frozenset(self.mutated),
            written_inputs=self._written_inputs(),
            problems=tuple(self.problems),
        )

    def _name_atoms(self) -> None:
        for block in self.blocks:
            call = self.recording.calls[block]
            for position, leaf in enumerate(call.outputs):
                if leaf.value is None:
                    continue
                maker = self.recording.makers[leaf.value]
                if call.first_op <= maker < call.end_op:
                    if leaf.value not in self.atom_of:
                        self.atom_of[leaf.value] = len(self.atoms)
                        self.atoms.append(Atom(call.path, call.number, position))
                elif leaf.value not in call.arguments:
                    self.problems.append(
                        Problem(block, "returns a tensor that it neither made nor was given")
                    )

    def _sources(self) -> list[int]:
        flows = [0] * len(self.recording.makers)
        position = {name: index for index, name in enumerate(self.input_names)}
        for value, name in self.recording.input_of.items():
            flows[value] = 1 << position[name]
        for value, tensor in self.recording.tensor_of.items():
            flows[value] = 1 << (self.first_tensor + tensor)
        for value, atom in self.atom_of.items():
            flows[value] = 1 << (self.first_atom + atom)
        return flows

    def _flow(self, value: int, reader: int, call: int) -> int:
        """What flows into `value`, as seen from block `reader` (-1: glue)."""
        maker = self.recording.makers[value]
        owner = self.home[maker] if maker >= 0 else -1
        if owner >= 0 and owner == reader:
            return 0
        if owner < 0 or value in self.atom_of:
            return self.flows[value]
        self._report_hidden(owner, call)
        return 0

    def _report_hidden(self, owner: int, reader_call: int) -> None:
        recording = self.recording
        block = recording.calls[self.blocks[owner]]
        opaque = any(leaf.is_opaque for leaf in block.outputs)
        why = (
            "returns an object that hides its tensors from pytree"
            if opaque
            else f"hands a tensor to {recording.calls[reader_call].path or 'the denoiser'!r} by a side door "
            "(an attribute, or a list or dict argument) instead of returning it"
        )
        self._report(self.blocks[owner], why)

    def _report(self, call: int, reason: str) -> None:
        problem = Problem(call, reason)
        if problem not in self.problems:
            self.problems.append(problem)

    def _visit(self, index: int, call: int) -> None:
        op = self.recording.ops[index]
        owner = self.home[index]
        mask = 0
        for value in op.reads:
            mask |= self._flow(value, owner, call)
        if op.is_random:
            self._report(call, f"draws random numbers ({op.name})")
        if owner >= 0:
            self.reads[owner] |= mask
            for value in op.reads:
                _keep_first(self.glue_uses[owner], self.touched.get(value, {}))
            self._check_block_writes(owner, op.carried)
        else:
            self._note_glue_op(mask, op, call)
            self._note_glue_use(index, op, call)
        self._note_mutation(index, op.carried, owner)

    def _note_glue_op(self, mask: int, op: Op, call: int) -> None:
        self.glue |= mask
        if op.reaches_host:
            self.steering |= mask
            if mask & self.latents:
                self._report(call, f"looks at the values of the latents ({op.name}), which change every step")
            if mask >> self.first_atom:
                block = self.atoms[next(self._atoms_in(mask))].path
                self._report(
                    call,
                    f"looks at the values of a block's output ({block!r}, {op.name}), which then steer the "
                    "forward",
                )
        for value in op.writes:
            self.flows[value] = mask
        for old, new in op.carried:
            self.flows[new] = mask | self._flow(old, -1, call)

    def _note_glue_use(self, index: int, op: Op, call: int) -> None:
        """Since when glue has looked at the data of the atoms that flow into what the operation makes."""
        while self.num_ended < len(self.blocks) and self._end_of(self.num_ended) <= index:
            self.num_ended += 1
        found: dict[int, int] = {}
        for value in (*op.reads, *(old for old, _ in op.carried)):
            _keep_first(found, self.touched.get(value, {}))
            if op.touches_data:
                for atom in self._atoms_in(self._flow(value, -1, call)):
                    found.setdefault(atom, self.num_ended)
        if found:
            self.touched.update(dict.fromkeys(op.writes, found))

    def _end_of(self, block: int) -> int:
        return self.recording.calls[self.blocks[block]].end_op

    def _check_block_writes(self, owner: int, carried: tuple[tuple[int, int], ...]) -> None:
        """A block may write into what another made (FreeU scales its argument in place) if nothing reads the
        result but the block itself: readers of the new value elsewhere show up as hidden. What outlives the
        forward, and what is returned as if it were new, cannot be told apart afterwards."""
        for old, new in carried:
            maker = self.recording.makers[old]
            if maker >= 0 and self.home[maker] == owner:
                continue
            if self.recording.storages[old] in self.lasting_storages or maker < 0:
                self._report(
                    self.blocks[owner], "writes in place into a parameter, buffer or input of the denoiser"
                )
            elif new in self.atom_of:
                self._report(
                    self.blocks[owner], "writes in place into a tensor made outside it and returns it"
                )

    def _note_mutation(self, index: int, carried: tuple[tuple[int, int], ...], owner: int) -> None:
        if not carried:
            return
        storages = {self.recording.storages[old] for old, _ in carried}
        for storage in storages:
            leaves = [
                value for value in self.leaves_by_storage.get(storage, ())
                if self._block_end(value) <= index
            ]  # fmt: skip
            self.mutated.update(self.atom_of[value] for value in leaves)
            if owner < 0:
                self._check_shared_write(
                    [pair for pair in carried if self.recording.storages[pair[0]] == storage]
                )

    def _check_shared_write(self, carried: list[tuple[int, int]]) -> None:
        """Leaves that share memory with each other, or with a tensor older than their block, are separate
        tensors when replayed. A glue write through one of them must not matter to another.

        The written tensor comes first in `carried`.
        """
        written = self._origin(carried[0][0])
        for old, new in carried[1:]:
            origin = self._origin(old)
            if origin != written and new in self.used:
                leaf = origin if origin >= 0 else written
                block = self.blocks[self.home[self.recording.makers[leaf]]]
                self._report(block, "returns a view of a tensor that is written in place later")

    def _origin(self, value: int) -> int:
        """The leaf of which a value is a view or a later version; -1 for what no block made."""
        recording = self.recording
        storage = recording.storages[value]
        while value not in self.atom_of:
            maker = recording.makers[value]
            if maker < 0:
                return -1
            op = recording.ops[maker]
            before = [old for old, new in op.carried if new == value] or [
                read for read in op.reads if recording.storages[read] == storage
            ]
            if not before:
                return -1
            value = before[0]
        return value

    def _block_end(self, value: int) -> int:
        return self._end_of(self.home[self.recording.makers[value]])

    def _check_kept(self) -> None:
        for path, name, value in self.recording.kept:
            if self.recording.depends_on_latents[value]:
                holder = next((i for i, call in enumerate(self.recording.calls) if call.path == path), 0)
                self._report(
                    holder, f"keeps an activation from one forward to the next in its attribute {name!r}"
                )

    def _written_inputs(self) -> frozenset[str]:
        """Inputs whose memory the forward writes into."""
        recording = self.recording
        written = {recording.storages[old] for op in recording.ops for old, _ in op.carried}
        return frozenset(
            name for value, name in recording.input_of.items() if recording.storages[value] in written
        )

    def _inputs_in(self, mask: int) -> Iterator[str]:
        return (self.input_names[bit] for bit in _bits(mask & ((1 << self.first_tensor) - 1)))

    def _tensors_in(self, mask: int) -> Iterator[int]:
        return _bits((mask & ((1 << self.first_atom) - 1)) >> self.first_tensor)

    def _atoms_in(self, mask: int) -> Iterator[int]:
        return _bits(mask >> self.first_atom)


def _keep_first(found: dict[int, int], more: Mapping[int, int]) -> None:
    """Atoms and their `glue_uses`, of all that flow together."""
    for atom, ended in more.items():
        if ended < found.get(atom, ended + 1):
            found[atom] = ended


def _homes(recording: Recording, blocks: tuple[int, ...]) -> tuple[int, ...]:
    homes = [-1] * len(recording.ops)
    for position, block in enumerate(blocks):
        call = recording.calls[block]
        homes[call.first_op : call.end_op] = [position] * (call.end_op - call.first_op)
    return tuple(homes)


def _used_values(recording: Recording) -> frozenset[int]:
    """Values that an operation reads or the denoiser returns, and earlier versions of these."""
    used = {leaf.value for leaf in recording.calls[0].outputs if leaf.value is not None}
    for op in reversed(recording.ops):
        used.update(old for old, new in op.carried if new in used)
        used.update(op.reads)
    return frozenset(used)


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low

"""From recording, graph and partition to what one stage does at every module call. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from asyncdiff.errors import ConfigurationError
from asyncdiff.graph import Atom, BlockGraph, Partition, Segment, crossing_atoms
from asyncdiff.stage.spec import (
    Action,
    Argument,
    Capture,
    Constant,
    Fill,
    OutputSpec,
    Own,
    Placeholder,
    Received,
    Run,
    StageSpec,
    Stub,
)
from asyncdiff.trace.provenance import Provenance, provenance
from asyncdiff.trace.recording import Leaf, Recording


def stage_spec(
    recording: Recording,
    graph: BlockGraph,
    partition: Partition,
    stage: int,
    fresh: Mapping[int, Collection[Atom]] | None = None,
) -> StageSpec:
    """What `stage` holds, reads, runs and emits.

    `graph` is one of `find_blocks(recording, ...)`; `ConfigurationError` if `partition` does not fit it.
    `fresh`: by reading segment, the leaves that may arrive while the stage runs: they are waited for as late
    as possible.
    """
    segments = partition.segments(graph)
    unknown = [str(block.key) for block in graph.blocks if block.key not in recording.call_of]
    if unknown:
        raise ConfigurationError(f"The graph is not of this recording: it has no call {unknown[0]}.")
    flow = provenance(recording, (recording.call_of[block.key] for block in graph.blocks))
    return _Planner(recording, graph, partition, segments, flow, stage, fresh or {}).spec()


class _Planner:
    def __init__(
        self,
        recording: Recording,
        graph: BlockGraph,
        partition: Partition,
        segments: tuple[Segment, ...],
        flow: Provenance,
        stage: int,
        fresh: Mapping[int, Collection[Atom]],
    ) -> None:
        self.recording = recording
        self.flow = flow
        self.stage = stage
        self.position_of = {call: position for position, call in enumerate(flow.blocks)}
        self.stage_of = [partition.stage_of[recording.calls[call].key] for call in flow.blocks]
        self.returns_output = segments[-1].stage == stage
        own = [call for call, owner in zip(flow.blocks, self.stage_of, strict=True) if owner == stage]
        self.own_blocks = own
        # Neither where the output is returned nor where the stage idles, and so is never run.
        self.last_own = -1 if self.returns_output or not own else own[-1]
        crossing = crossing_atoms(graph, segments)
        own_segments = [segment.index for segment in segments if segment.stage == stage]
        self.reads = {
            index: graph.order(
                {atom for (_, reader), atoms in crossing.items() if reader == index for atom in atoms}
            )
            for index in own_segments
        }
        self.emits = graph.order(
            {atom for (producer, _), atoms in crossing.items() if producer in own_segments for atom in atoms}
        )
        self.reader_of = {atom: index for index in reversed(own_segments) for atom in self.reads[index]}
        self.live = _live_values(recording, flow, self.stage_of, stage, self.returns_output)
        self.fills = self._fills(graph, fresh)
        self.later = {fill.atom: fill for fills in self.fills.values() for fill in fills}
        self.actions: dict[str, list[Action]] = {}

    def spec(self) -> StageSpec:
        self._walk(0)
        acting = {
            path: tuple(actions)
            for path, actions in self.actions.items()
            if any(not isinstance(action, Run) for action in actions)
        }
        return StageSpec(
            stage=self.stage,
            inputs=self.recording.inputs,
            actions=tuple(acting.items()),
            needed_inputs=self._needed_inputs(),
            written_inputs=self.flow.written_inputs,
            reads=self.reads,
            emits=self.emits,
            tensors=self._names(self._tensors()),
            used_tensors=self._names(self._used_tensors()),
            output=output_spec(self.recording),
            returns_output=self.returns_output,
        )

    def _walk(self, parent: int) -> None:
        """Visits the calls that happen in this stage's forward, in order, and says what each does."""
        for call in self.recording.children[parent]:
            action = self._action(call)
            self.actions.setdefault(self.recording.calls[call].path, []).append(action)
            if not isinstance(action, Stub):
                self._walk(call)

    def _action(self, call: int) -> Action:
        position = self.position_of.get(call)
        if position is not None:
            return self._own(call) if self.stage_of[position] == self.stage else self._stub(call)
        inside = [
            owner
            for block, owner in zip(self.flow.blocks, self.stage_of, strict=True)
            if call < block < self.recording.calls[call].end_call
        ]
        if inside and self.stage not in inside and self._replaceable(call):
            return self._stub(call)
        return Run()

    def _own(self, call: int) -> Own:
        return Own(
            captures=tuple(
                Capture(atom.leaf, atom, self._is_mutated(atom))
                for atom in self.emits
                if atom.block == self.recording.calls[call].key
            ),
            is_last=call == self.last_own,
            fills=tuple(self.fills.get(call, ())),
        )

    def _stub(self, call: int) -> Stub:
        record = self.recording.calls[call]
        assert record.structure is not None
        return Stub(record.structure, tuple(self._fill(call, leaf) for leaf in record.outputs))

    def _fill(self, call: int, leaf: Leaf) -> Fill:
        if leaf.value is None or leaf.spec is None:
            return Constant(leaf.constant)
        arguments = self.recording.calls[call].arguments
        if leaf.value in arguments:
            return Argument(arguments.index(leaf.value))
        if leaf.value in self.live:
            atom = self.flow.atoms[self.flow.atom_of[leaf.value]]
            if atom in self.later:
                return self.later[atom]
            return Received(atom, self.reader_of[atom], self._is_mutated(atom))
        return Placeholder(leaf.spec)

    def _replaceable(self, call: int) -> bool:
        """Whether a foreign container can be one stub: whatever this stage needs from inside it is a leaf of
        an inner block and also a leaf that the container returns (no sum of leaves made by its own glue)."""
        record = self.recording.calls[call]
        returned = {leaf.value for leaf in record.outputs}
        return all(
            value in self.flow.atom_of and value in returned
            for value in self.live
            if record.first_op <= self.recording.makers[value] < record.end_op
        ) and all(self._is_fillable(call, leaf) for leaf in record.outputs)

    def _is_fillable(self, call: int, leaf: Leaf) -> bool:
        """A needed leaf that was made before the container is either one of its arguments or comes by a side
        way."""
        if leaf.value is None or leaf.value not in self.live or leaf.value in self.flow.atom_of:
            return True
        return leaf.value in self.recording.calls[call].arguments

    def _is_mutated(self, atom: Atom) -> bool:
        return self.flow.atoms.index(atom) in self.flow.mutated

    def _fills(self, graph: BlockGraph, fresh: Mapping[int, Collection[Atom]]) -> dict[int, list[Received]]:
        """Own block -> the fresh leaves that are wanted when it has run: something after it is the first to
        touch their data. Those that no own block runs before, and numbers that glue may index with, are
        waited for where they are replayed."""
        touches = self._touches()
        fills: dict[int, list[Received]] = {}
        for index, atoms in self.reads.items():
            for atom in atoms:
                spec = graph.spec(atom)
                if atom not in fresh.get(index, ()) or self.reader_of[atom] != index or not spec.is_floating:
                    continue
                producer = self.recording.call_of[atom.block]
                first = self._first_touch(touches, atom, since=self.recording.calls[producer].end_op)
                before = [
                    call
                    for call in self.own_blocks
                    if call > producer and self.recording.calls[call].end_op <= first
                ]
                if before:
                    fills.setdefault(before[-1], []).append(Received(atom, index, False, later=spec))
        return fills

    def _touches(self) -> dict[int, list[int]]:
        """Storage -> the operations on its data that matter on this stage, in order."""
        found: dict[int, list[int]] = {}
        for index, op in enumerate(self.recording.ops):
            home = self.flow.home[index]
            matters = self.stage_of[home] == self.stage if home >= 0 else not self.live.isdisjoint(op.writes)
            if matters and op.touches_data:
                for value in {*op.reads, *(old for old, _ in op.carried)}:
                    found.setdefault(self.recording.storages[value], []).append(index)
        return found

    def _first_touch(self, touches: Mapping[int, Sequence[int]], atom: Atom, since: int) -> int:
        """The first operation from `since` on that touches a leaf; one past the last if there is none."""
        position = self.flow.atoms.index(atom)
        value = next(value for value, each in self.flow.atom_of.items() if each == position)
        later = (index for index in touches.get(self.recording.storages[value], ()) if index >= since)
        return next(later, len(self.recording.ops))

    def _needed_inputs(self) -> tuple[str, ...]:
        needed = {name for value, name in self.recording.input_of.items() if value in self.live}
        needed |= self.flow.steering_inputs
        return tuple(name for name in self.recording.inputs.names if name in needed)

    def _used_tensors(self) -> set[int]:
        """Read by own blocks or by any glue.

        Glue of foreign containers is included: with another structure of inputs they may have to be run.
        """
        used = set(self.flow.glue_tensors)
        for position, owner in enumerate(self.stage_of):
            if owner == self.stage:
                used |= self.flow.tensors[position]
        return used

    def _tensors(self) -> set[int]:
        """The used ones, all below own blocks, and all below no block (branches that this structure
        skips)."""
        own = tuple(self.recording.calls[call].path + "." for call in self.own_blocks)
        all_blocks = tuple(self.recording.calls[call].path + "." for call in self.flow.blocks)
        return self._used_tensors() | {
            index
            for index, tensor in enumerate(self.recording.tensors)
            if any(name.startswith(own) for name in tensor.names)
            or not any(name.startswith(all_blocks) for name in tensor.names)
        }

    def _names(self, tensors: set[int]) -> frozenset[str]:
        return frozenset(name for index in tensors for name in self.recording.tensors[index].names)


def _live_values(
    recording: Recording, flow: Provenance, stage_of: list[int], stage: int, returns_output: bool
) -> frozenset[int]:
    """The values on which this stage's own blocks (and the output, if it returns it) depend through glue.

    Followed backwards; leaves of foreign blocks, denoiser inputs and parameters are where it ends.
    """
    live: set[int] = set()
    if returns_output:
        live |= {leaf.value for leaf in recording.calls[0].outputs if leaf.value is not None}
    for index in range(len(recording.ops) - 1, -1, -1):
        op, home = recording.ops[index], flow.home[index]
        if home >= 0:
            if stage_of[home] == stage:
                live |= {value for value in op.reads if not _made_in(recording, flow, value, home)}
        elif not live.isdisjoint(op.writes):
            live |= {old for old, new in op.carried if new in live}
            live |= set(op.reads)
    return frozenset(live)


def _made_in(recording: Recording, flow: Provenance, value: int, home: int) -> bool:
    maker = recording.makers[value]
    return maker >= 0 and flow.home[maker] == home


def output_spec(recording: Recording) -> OutputSpec:
    """What the recorded forward returned."""
    root = recording.calls[0]
    assert root.structure is not None
    return OutputSpec(root.structure, tuple(leaf.spec or Constant(leaf.constant) for leaf in root.outputs))

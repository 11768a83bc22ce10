"""Which calls are the blocks: containers are opened only where a cut has to run through them.

Skip connections of an opened `Transformer2DModel` become the sum of two leaves, twice the traffic, so a
closed container is better wherever the balance allows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from asyncdiff.errors import UnsupportedDenoiserError
from asyncdiff.graph import Block, BlockGraph, BlockKey, Partition
from asyncdiff.trace.costs import CallCost, EstimateCost, flops_only, subtree_costs
from asyncdiff.trace.inputs import TIMESTEP_NAMES
from asyncdiff.trace.provenance import Problem, Provenance, provenance
from asyncdiff.trace.recording import Recording, paths_above

# The largest stage may take this much of the mean before more containers are opened.
BALANCE = 1.05
# A call is glue if it has no parameters and less than this share of the cost (Lumina2's rope helpers).
_GLUE_SHARE = 0.01
# A container may be opened if the calls below it make at least / its own operations at most these shares of
# its cost.
_CHILDREN_SHARE, _OWN_GLUE_SHARE = 0.5, 0.1


def call_costs(recording: Recording) -> dict[BlockKey, CallCost]:
    """All calls that can become blocks, in execution order, nested ones included: what a profiler should
    time. Nothing inside of what hangs together (a mixture of experts)."""
    found: dict[BlockKey, CallCost] = {}
    view = _View(recording, subtree_costs(recording, None, flops_only))
    _open_all(view, 0)
    _separable(view)

    def visit(call: int, parent: BlockKey | None) -> None:
        for child in view.candidates(call):
            key = recording.calls[child].key
            found[key] = CallCost(*recording.work[child], parent)
            if child in view.opened:
                visit(child, key)

    visit(0, None)
    return found


def _open_all(view: _View, call: int) -> None:
    for child in view.candidates(call):
        if view.may_open(child, fine=True):
            view.opened.add(child)
            _open_all(view, child)


def find_blocks(
    recording: Recording,
    num_stages: int | None = None,
    *,
    seconds: Mapping[BlockKey, float] | None = None,
    cost: EstimateCost = flops_only,
    kind: str = "chain",
    block_paths: Sequence[str] | None = None,
) -> BlockGraph:
    """The blocks of the denoiser and what each reads.

    With `num_stages`: as coarse as lets a `kind` partition into that many stages be balanced (largest stage
    <= 1.05 x mean where the calls allow it), by `seconds` (measured, per call) or else `cost(flops,
    memory_bytes)`. With `block_paths`: opened so that each listed module, or everything below it, is a block;
    for a hand-made partition and for another structure of inputs with the same ownership (`reown`). Calls
    that no path covers are blocks too; paths that these inputs never call (SD3's `skip_layers`) have none.
    `UnsupportedDenoiserError`, naming the module and the reason, if the denoiser cannot be split, or not into
    so many stages.
    """
    if (num_stages is None) == (block_paths is None):
        raise TypeError("find_blocks takes either num_stages or block_paths.")
    _refuse_random(recording)
    _refuse_steering_timestep(recording)
    view = _View(recording, subtree_costs(recording, seconds, cost), frozenset(block_paths or ()))
    if block_paths is not None:
        blocks, flow = _open_for_paths(view, block_paths)
    else:
        assert num_stages is not None
        blocks, flow = _open_for_balance(view, num_stages, kind)
        if len(blocks) < _num_segments(num_stages, kind):
            raise UnsupportedDenoiserError(
                f"num_stages={num_stages} ({kind}) needs {_num_segments(num_stages, kind)} blocks, but this "
                f"denoiser can only be cut into {len(blocks)}{_why_closed(view)}. Use fewer stages."
            )
    return _graph(recording, flow, seconds)


def reown(old: Partition, graph: BlockGraph) -> Partition:
    """The partition of `graph` (another structure of inputs) in which every module stays where `old` has it.

    A block belongs to the owner of the same call, else of the same path, else of the nearest path above or
    below it, else of the block before it in execution order (the first block: stage 0). A stage all of whose
    modules these inputs skip idles.
    """
    by_path: dict[str, int] = {}
    for key, stage in old.stage_of.items():
        by_path.setdefault(key.path, stage)
    stages: list[list[BlockKey]] = [[] for _ in range(old.num_stages)]
    before = 0
    for block in graph.blocks:
        owner = _owner(block.key, old.stage_of, by_path)
        before = before if owner is None else owner
        stages[before].append(block.key)
    return Partition(old.kind, tuple(tuple(keys) for keys in stages), may_idle=True)


def _owner(key: BlockKey, by_key: Mapping[BlockKey, int], by_path: Mapping[str, int]) -> int | None:
    if key in by_key:
        return by_key[key]
    parts = key.path.split(".")
    for length in range(len(parts), 0, -1):
        stage = by_path.get(".".join(parts[:length]))
        if stage is not None:
            return stage
    return next((stage for path, stage in by_path.items() if path.startswith(key.path + ".")), None)


@dataclass
class _View:
    """A recording with costs, the containers opened so far, and those that turned out to be inseparable.

    `listed`: paths that are blocks whatever they cost.
    """

    recording: Recording
    costs: Sequence[float]
    listed: frozenset[str] = frozenset()
    opened: set[int] = field(default_factory=lambda: {0})
    closed: dict[int, Problem] = field(default_factory=dict)

    def blocks(self) -> tuple[int, ...]:
        """The calls that are blocks now, in execution order."""
        found: list[int] = []

        def visit(call: int) -> None:
            for child in self.candidates(call):
                if child in self.opened:
                    visit(child)
                else:
                    found.append(child)

        visit(0)
        return tuple(found)

    def candidates(self, call: int) -> list[int]:
        """The children of a call that are no glue."""
        return [child for child in self.recording.children[call] if not self._is_glue(child)]

    def may_open(self, call: int, *, fine: bool) -> bool:
        """Whether the call's children can take its place: list elements, or with `fine` any modules."""
        children = self.candidates(call)
        if not fine and not any(self.recording.calls[child].in_list for child in children):
            return False
        if not children or call in self.closed:
            return False
        inside = sum(self.costs[child] for child in children)
        listed = sum(self.costs[child] for child in children if fine or self.recording.calls[child].in_list)
        total = self.costs[call]
        return listed >= _CHILDREN_SHARE * total and total - inside <= _OWN_GLUE_SHARE * total

    def _is_glue(self, call: int) -> bool:
        record = self.recording.calls[call]
        if self.listed and _covered(record.path, self.listed):
            return not any(leaf.value is not None for leaf in record.outputs)
        depends = self.recording.depends_on_latents
        if not any(leaf.value is not None and depends[leaf.value] for leaf in record.outputs):
            return not self._works_on_latents(call)
        return not record.has_parameters and self.costs[call] < _GLUE_SHARE * self.costs[0]

    def _works_on_latents(self, call: int) -> bool:
        """Whether a call without such an output still computes on the latents (an object pytree cannot
        open)."""
        record = self.recording.calls[call]
        if not any(leaf.is_opaque for leaf in record.outputs):
            return False
        depends = self.recording.depends_on_latents
        ops = self.recording.ops[record.first_op : record.end_op]
        return any(depends[value] for op in ops for value in op.writes)


def _covered(path: str, listed: Iterable[str]) -> bool:
    return any(path == name or path.startswith(name + ".") for name in listed)


def _separable(view: _View) -> tuple[tuple[int, ...], Provenance]:
    """The blocks and their provenance, after closing every container whose parts hang together."""
    while True:
        blocks = view.blocks()
        flow = provenance(view.recording, blocks)
        if not flow.problems:
            return blocks, flow
        # All found before any is closed: a second problem of one container is not the next one's.
        found: dict[int, Problem] = {}
        for problem in flow.problems:
            found.setdefault(_nearest_opened(view, problem.call), problem)
        if 0 in found:
            _refuse(view.recording, found[0])
        view.opened -= found.keys()
        view.closed |= found


def _nearest_opened(view: _View, call: int) -> int:
    while call not in view.opened:
        call = view.recording.calls[call].parent
    return call


def _refuse(recording: Recording, problem: Problem) -> None:
    path = recording.calls[problem.call].path or "(the denoiser itself)"
    raise UnsupportedDenoiserError(f"The denoiser cannot be split: its module {path!r} {problem.reason}.")


def _refuse_random(recording: Recording) -> None:
    for op in recording.ops:
        if op.is_random:
            path = recording.calls[op.call].path or "(the denoiser itself)"
            raise UnsupportedDenoiserError(
                f"The denoiser cannot be split: its module {path!r} draws random numbers ({op.name}), "
                "and every stage would draw its own. If it is in training mode, call .eval()."
            )


def _refuse_steering_timestep(recording: Recording) -> None:
    for name in recording.steering_inputs.intersection(TIMESTEP_NAMES):
        raise UnsupportedDenoiserError(
            f"The denoiser cannot be split: what it does depends on the value of its input {name!r}, which "
            "changes every step."
        )


def _open_for_balance(view: _View, num_stages: int, kind: str) -> tuple[tuple[int, ...], Provenance]:
    blocks, flow = _separable(view)
    for fine in (False, True):
        while True:
            if _is_enough(view, blocks, num_stages, kind):
                return blocks, flow
            to_open = _to_open(view, blocks, num_stages, kind, fine=fine)
            if not to_open:
                break
            view.opened.update(to_open)
            blocks, flow = _separable(view)
    return blocks, flow


def _to_open(view: _View, blocks: Sequence[int], num_stages: int, kind: str, *, fine: bool) -> list[int]:
    """What an ideal cut misses by more than a tolerance; else by anything; else, with too few blocks, all of
    them."""
    for tolerance in ((BALANCE - 1) / 2, 0.0):
        through = _cut_through(view, blocks, num_stages, kind, tolerance)
        openable = [call for call in through if view.may_open(call, fine=fine)]
        if openable:
            return openable
    if len(blocks) < _num_segments(num_stages, kind):
        return [call for call in blocks if view.may_open(call, fine=fine)]
    return []


def _is_enough(view: _View, blocks: Sequence[int], num_stages: int, kind: str) -> bool:
    costs = [view.costs[block] for block in blocks]
    if len(blocks) < _num_segments(num_stages, kind):
        return False
    bound = BALANCE * sum(costs) / num_stages
    return _fits_nested(costs, num_stages, bound) if kind == "nested" else _fits(costs, num_stages, bound)


def _fits(costs: Sequence[float], num_stages: int, bound: float) -> bool:
    """Whether a contiguous partition exists in which no stage costs more than `bound` (greedy filling)."""
    filled, stages = 0.0, 1
    for cost in costs:
        if cost > bound:
            return False
        if filled + cost > bound:
            filled, stages = 0.0, stages + 1
        filled += cost
    return stages <= num_stages


def _fits_nested(costs: Sequence[float], num_stages: int, bound: float) -> bool:
    if num_stages == 1:
        return sum(costs) <= bound
    for start in range(1, len(costs)):
        outer = sum(costs[:start])
        position = start
        for _ in range(num_stages - 1):
            filled = 0.0
            while position < len(costs) - 1 and filled + costs[position] <= bound:
                filled += costs[position]
                position += 1
        if outer + sum(costs[position:]) <= bound:
            return True
    return False


def _cut_through(
    view: _View, blocks: Sequence[int], num_stages: int, kind: str, tolerance_in_stages: float
) -> list[int]:
    """The blocks that an ideal cut runs through, further from both ends than the tolerance.

    A nested split begins and ends with half a stage, on the same device.
    """
    total = sum(view.costs[block] for block in blocks)
    tolerance = tolerance_in_stages * total / num_stages
    shift = 0.5 if kind == "nested" else 0.0
    cuts = [total * (k + shift) / num_stages for k in range(0 if shift else 1, num_stages)]
    found: list[int] = []
    start = 0.0
    for block in blocks:
        end = start + view.costs[block]
        if any(start + tolerance < cut < end - tolerance for cut in cuts):
            found.append(block)
        start = end
    return found


def _num_segments(num_stages: int, kind: str) -> int:
    return num_stages + 1 if kind == "nested" and num_stages > 1 else num_stages


def _why_closed(view: _View) -> str:
    if not view.closed:
        return ""
    call, problem = next(iter(view.closed.items()))
    calls = view.recording.calls
    return (
        f" ({calls[call].path!r} cannot be opened, because its {calls[problem.call].path!r} {problem.reason})"
    )


def _open_for_paths(view: _View, block_paths: Sequence[str]) -> tuple[tuple[int, ...], Provenance]:
    while True:
        blocks, flow = _separable(view)
        to_open = [
            block
            for block in blocks
            if not _covered(view.recording.calls[block].path, block_paths)
            and any(path.startswith(view.recording.calls[block].path + ".") for path in block_paths)
        ]
        inseparable = [block for block in to_open if block in view.closed]
        if inseparable:
            _refuse(view.recording, view.closed[inseparable[0]])
        if not to_open:
            return blocks, flow
        view.opened.update(to_open)


def _graph(recording: Recording, flow: Provenance, seconds: Mapping[BlockKey, float] | None) -> BlockGraph:
    blocks = tuple(_block(recording, flow, position, seconds or {}) for position in range(len(flow.blocks)))
    paths = {block.key.path for block in blocks}
    root = recording.calls[0]
    return BlockGraph(
        blocks=blocks,
        output_reads=tuple(flow.atoms[atom] for atom in flow.output_atoms),
        output_inputs=tuple(sorted(flow.output_inputs)),
        outputs=tuple(leaf.spec for leaf in root.outputs if leaf.spec is not None),
        glue_flops=recording.work[0][0] - sum(block.flops for block in blocks),
        glue_parameter_bytes=sum(
            tensor.num_bytes
            for tensor in recording.tensors
            if not any(path in paths for name in tensor.names for path in paths_above(name))
        ),
        glue_seconds=_glue_seconds(root.key, blocks, seconds or {}),
        latents=recording.latents,
        output_glue_uses=tuple(flow.output_glue_uses.get(atom) for atom in flow.output_atoms),
    )


def _glue_seconds(root: BlockKey, blocks: Sequence[Block], seconds: Mapping[BlockKey, float]) -> float | None:
    """What the whole forward takes longer than its blocks, where all of that was measured."""
    inside = [block.seconds for block in blocks if block.seconds is not None]
    if root not in seconds or len(inside) < len(blocks):
        return None
    return max(0.0, seconds[root] - sum(inside))


def _block(recording: Recording, flow: Provenance, position: int, seconds: Mapping[BlockKey, float]) -> Block:
    index = flow.blocks[position]
    call = recording.calls[index]
    flops, memory_bytes = recording.work[index]
    atoms = flow.reads[position]
    return Block(
        key=call.key,
        flops=flops,
        memory_bytes=memory_bytes,
        parameter_bytes=recording.parameter_bytes.get(call.path, 0),
        outputs=tuple(leaf.spec for leaf in call.outputs),
        reads=tuple(flow.atoms[atom] for atom in atoms),
        inputs=tuple(sorted(flow.inputs[position])),
        glue_uses=tuple(flow.glue_uses[position].get(atom) for atom in atoms),
        seconds=seconds.get(call.key),
    )

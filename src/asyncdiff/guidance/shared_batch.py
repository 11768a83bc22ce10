"""Which inputs of a denoiser call carry its batch, and the call taken apart along it.

Learned from a trace with another batch size, not from names: an input carries the batch if the forward only
fits together when that input grows with the latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from asyncdiff.errors import UnsupportedDenoiserError
from asyncdiff.trace import Inputs, Recording, quiet_failures_of_fake_tensors, record
from asyncdiff.weights import Skeleton, load_skeleton

# How many copies of a part the other batch has: primes that divide no other length, so that the batch is seen
# in the size of what carries it. The second is for lengths that are made in the forward (a sequence of image
# and prompt) and have the first in them. A large batch costs nothing on fake tensors.
_PRIMES = (13, 17, 19, 23, 29, 31, 37, 41, 43, 47)
_NUM_PRIMES = 2
_WITHOUT_DATA = ("fake", "mixed")


@dataclass(frozen=True)
class SharedBatch:
    """A call whose batch is shared in `num_parts` equal parts. `carriers`: the tensor inputs that are cut
    along dim 0; every part is given the others whole."""

    num_parts: int
    carriers: frozenset[str]


def find_shared_batch(
    skeleton: Skeleton, inputs: Inputs, num_parts: int, device: torch.device
) -> SharedBatch | None:
    """How a call can be taken apart; None where it cannot, because the batch is no multiple of the parts, or
    inputs or outputs have it in another place than dim 0.

    Nor where the forward makes something of the batch by which samples could know of others (`_mixes`). What
    only moves them along dim 0 is not noticed; no denoiser of diffusers does it.
    """
    batch = batch_size(inputs)
    if batch % num_parts or batch < num_parts:
        return None
    primes = _primes(skeleton, inputs)
    candidates = [SharedBatch(num_parts, carriers) for carriers in _candidates(inputs, batch)]
    for copies in primes:
        for candidate in candidates:
            recording = _trace(skeleton, _grown(inputs, candidate, copies), device)
            if _fits(recording, inputs, candidate, copies):
                return candidate
            alone = _mixing_alone(recording, inputs, candidate.carriers, copies)
            if alone:
                without = SharedBatch(num_parts, candidate.carriers - alone)
                if _fits(_trace(skeleton, _grown(inputs, without, copies), device), inputs, without, copies):
                    return without
    if primes and _trace(skeleton, inputs, device) is None:  # nothing can be said without computing
        recording = _trace(skeleton, _grown(inputs, candidates[0], primes[0]), device, modes=("hollow",))
        if _fits(recording, inputs, candidates[0], primes[0]):
            return candidates[0]
    return None


def batch_size(inputs: Inputs) -> int:
    """Of a call: the latents' dim 0; 0 where they have none."""
    latents = inputs.tensors()[inputs.latents]
    return latents.shape[0] if latents.ndim else 0


def _primes(skeleton: Skeleton, inputs: Inputs) -> list[int]:
    lengths = {length for spec in skeleton.specs.values() for length in spec.shape}
    lengths |= {length for tensor in inputs.tensors().values() for length in tensor.shape}
    return [prime for prime in _PRIMES if all(length % prime for length in lengths)][:_NUM_PRIMES]


def _candidates(inputs: Inputs, batch: int) -> Iterator[frozenset[str]]:
    """Sets of inputs that may carry the batch, the likeliest first.

    All whose dim 0 is as long as it; all of a multiple too (a prompt's embedding for every frame), or one of
    them; all but one, whose length is the batch's by chance.
    """
    lengths = {name: tensor.shape[0] for name, tensor in inputs.tensors().items() if tensor.ndim}
    equal = frozenset(name for name, length in lengths.items() if length == batch)
    multiples = [name for name, length in lengths.items() if length > batch and length % batch == 0]
    yield equal
    if multiples:
        yield equal.union(multiples)
    if len(multiples) > 1:
        yield from (equal | {name} for name in multiples)
    yield from (equal - {name} for name in sorted(equal) if name != inputs.latents)


def _grown(inputs: Inputs, shared: SharedBatch, copies: int) -> Inputs:
    """The call with copies of its first part as the batch."""
    return _with_leaves(
        inputs,
        {
            name: torch.cat([_part(tensor, 0, shared.num_parts)] * copies)
            for name, tensor in inputs.tensors().items()
            if name in shared.carriers
        },
    )


def _trace(
    skeleton: Skeleton, inputs: Inputs, device: torch.device, modes: Sequence[str] = _WITHOUT_DATA
) -> Recording | None:
    """None where the forward cannot be run so: shapes do not fit, or it looks at values."""
    try:
        with quiet_failures_of_fake_tensors():
            return record(load_skeleton(skeleton, {}), inputs, device=device, modes=modes)
    except UnsupportedDenoiserError:
        return None


def _fits(recording: Recording | None, inputs: Inputs, shared: SharedBatch, copies: int) -> bool:
    """Whether the forward has kept so many copies of a part apart, and returned as many."""
    if recording is None or _mixes(recording, shared.carriers, copies):
        return False
    shapes = [leaf.spec.shape for leaf in recording.calls[0].outputs if leaf.spec is not None]
    expected = copies * (batch_size(inputs) // shared.num_parts)
    return bool(shapes) and all(shape and shape[0] == expected for shape in shapes)


def _mixes(recording: Recording, carriers: frozenset[str], copies: int) -> bool:
    """Whether the forward makes anything of these inputs that has not the batch in its size once: a mean over
    the samples, what it takes from one of them for all (OmniGen does, with positions), a product of every
    sample with every other."""
    sizes = zip(recording.num_elements, recording.depends_on(carriers), strict=True)
    return any(_is_odd(size, copies) for size, is_theirs in sizes if is_theirs)


def _is_odd(size: int, copies: int) -> bool:
    return size > 0 and (size % copies > 0 or size % copies**2 == 0)


def _mixing_alone(
    recording: Recording | None, inputs: Inputs, carriers: frozenset[str], copies: int
) -> frozenset[str]:
    """The inputs of which, without any other's help, something is made that has not the batch in its size
    once: ids of which the first sample's are taken for all (OmniGen, FLUX.2)."""
    if recording is None:
        return frozenset()
    found = set()
    for name in carriers - {inputs.latents}:
        own, others = recording.depends_on({name}), recording.depends_on(carriers - {name})
        values = zip(recording.num_elements, own, others, strict=True)
        if any(_is_odd(size, copies) for size, is_own, is_others in values if is_own and not is_others):
            found.add(name)
    return frozenset(found)


def _part(tensor: torch.Tensor, part: int, num_parts: int) -> torch.Tensor:
    length = tensor.shape[0] // num_parts
    return tensor.narrow(0, part * length, length)


def _with_leaves(inputs: Inputs, replaced: Mapping[str, torch.Tensor]) -> Inputs:
    leaves = [replaced.get(name, leaf) for name, leaf in zip(inputs.names, inputs.leaves, strict=True)]
    return replace(inputs, leaves=tuple(leaves))


@dataclass
class PartsMemory:
    """Takes the calls of one channel apart.

    The parts of an input that has not changed since the call before are the same objects again, by which
    executors know that they need not be sent.
    """

    _last: dict[str, tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = field(default_factory=dict)

    def parts(self, inputs: Inputs, shared: SharedBatch) -> tuple[Inputs, ...]:
        """The inputs of each part; nothing is copied."""
        parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shared.num_parts)]
        last, self._last = self._last, {}
        for name, tensor in inputs.tensors().items():
            if name in shared.carriers:
                before = last.get(name)
                is_same = before is not None and before[0] is tensor and len(before[1]) == shared.num_parts
                views = (
                    before[1]
                    if before is not None and is_same
                    else tuple(_part(tensor, part, shared.num_parts) for part in range(shared.num_parts))
                )
                self._last[name] = (tensor, views)
                for own, view in zip(parts, views, strict=True):
                    own[name] = view
        return tuple(_with_leaves(inputs, own) for own in parts)

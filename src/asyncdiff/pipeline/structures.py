"""What is known of a denoiser's inputs by their structure, and the weights that the first one places.

Inputs of another structure (a resolution, a batch size) are analysed when they come. The first ones settle
the plan, and with it where every weight goes; later ones keep every block where it is.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from asyncdiff.config import Settings
from asyncdiff.errors import ParallelizedError
from asyncdiff.graph import Partition
from asyncdiff.guidance import SharedBatch, find_shared_batch
from asyncdiff.pipeline.analysis import Analysis, analyse, analyse_again, first_plan, record_call
from asyncdiff.pipeline.denoiser import refuse_compiled, refuse_offloading
from asyncdiff.pipeline.devices import have_room
from asyncdiff.pipeline.guards import guard_names, refuse_other_ways
from asyncdiff.pipeline.partition_request import PartitionRequest
from asyncdiff.planner import Plan
from asyncdiff.runtime.awaited import arrived
from asyncdiff.runtime.groups import Groups
from asyncdiff.runtime.interrupts import interrupts_deferred
from asyncdiff.trace import Inputs
from asyncdiff.weights import Skeleton, dump_skeleton, merged_adapters

# How many analyses of one input structure are kept, which differ in what steers the forward (a prompt's
# mask). The calls of one step may each have one.
_MAX_ANALYSES = 8
_MAX_STRUCTURES = 32  # resolutions, batch sizes, ControlNet or none ...


class Structures:
    """Of one denoiser, which `pipe` calls `name`.

    `plan`: None before the first call, unless one was given. `analyses`: by the structure of the inputs, the
    newest last. `owners`: which stage has which block, None before the first call. `ships`: the weights go to
    other processes.
    """

    def __init__(
        self,
        pipe: Any,
        name: str,
        denoiser: nn.Module,
        devices: tuple[str, ...],
        *,
        partition: PartitionRequest,
        plan: Plan | None,
        threads: int | None,
        ships: bool,
    ) -> None:
        self.plan = plan
        self.owners: Partition | None = None
        self.analyses: dict[Any, list[Analysis]] = {}
        self._pipe = pipe
        self._name = name
        self._denoiser = denoiser
        self._devices = devices
        self._device = torch.device(devices[0])
        self._dtype = next(denoiser.parameters()).dtype
        self._partition = partition
        self._threads = threads
        self._ships = ships
        self._skeleton: Skeleton | None = None
        self._installed: Skeleton | None = None
        self._merged = merged_adapters(denoiser)
        self._numbers = itertools.count()
        self._retired: list[int] = []
        self._shared_batches: dict[Any, SharedBatch | None] = {}

    def analysis(self, inputs: Inputs, settings: Settings, groups: Groups) -> Analysis:
        """Of inputs like these, which the groups are ready to run. What was longest not asked for makes room:
        of all structures, and of the calls of one."""
        key = inputs.key()
        known = self.analyses[key] = self.analyses.pop(key, [])  # the newest is last
        while len(self.analyses) > _MAX_STRUCTURES:
            oldest = self.analyses.pop(next(iter(self.analyses)))
            self._retired.extend(analysis.number for analysis in oldest)
        for index, analysis in enumerate(known):
            if analysis.covers(inputs):
                known.append(known.pop(index))
                return analysis
        while len(known) >= _MAX_ANALYSES:
            self._retired.append(known.pop(0).number)
        known.append(self._analyse(inputs, settings, groups))
        return known[-1]

    def shared_batch(self, inputs: Inputs, num_parts: int) -> SharedBatch | None:
        """How a call like this is taken apart along its batch; None if it cannot be."""
        key = (inputs.key(), num_parts)
        if key not in self._shared_batches:
            while len(self._shared_batches) >= _MAX_STRUCTURES:
                self._shared_batches.pop(next(iter(self._shared_batches)))
            self._shared_batches[key] = find_shared_batch(
                self._current_skeleton(), _all_arrived(inputs), num_parts, self._device
            )
        return self._shared_batches[key]

    def have_room(self, num_stages: int) -> bool:
        """Whether the devices can hold the weights of so many stages."""
        return not self._ships or have_room(self._devices, self._current_skeleton().num_bytes / num_stages)

    def follow_changes(self) -> None:
        """What was changed on the denoiser since the last run (processors, FreeU, adapter scales) is passed
        on.

        Weights that were changed past the guards (by a function of peft, by another pipeline that shares the
        denoiser) cannot be: they are elsewhere.
        """
        if self._skeleton is None:
            return
        skeleton = self._dump()
        if skeleton.payload == self._skeleton.payload:
            return
        if skeleton.specs != self._skeleton.specs or merged_adapters(self._denoiser) != self._merged:
            changed = sorted(skeleton.specs.keys() ^ self._skeleton.specs.keys())
            raise ParallelizedError(
                "The denoiser's weights were changed after parallelize "
                f"({', '.join(changed[:3]) or 'other shapes or values'}{' ...' * (len(changed) > 3)}), by "
                "other means than the methods of the pipeline that was parallelized or of its denoiser. Use "
                "those, or call handle.remove() first, change them, then parallelize again."
            )
        self._skeleton = skeleton
        self._forget()

    def forget_weights(self) -> None:
        """They are all in this process, and may change: the next analysis ships them again."""
        self._skeleton = self._installed = None
        self._forget()

    def note_weights(self) -> None:
        """They have been changed as far as they will be."""
        self._merged = merged_adapters(self._denoiser)

    def _analyse(self, inputs: Inputs, settings: Settings, groups: Groups) -> Analysis:
        unloaded = any(parameter.is_meta for parameter in self._denoiser.parameters())
        weights_at_hand = not unloaded and (self._installed is None or not self._ships)
        skeleton = self._current_skeleton()
        inputs = _all_arrived(inputs)
        recording = record_call(
            self._denoiser, skeleton, inputs, self._device, weights_at_hand=weights_at_hand
        )
        number = next(self._numbers)
        if self.owners is None:
            self.plan = self.plan or first_plan(
                recording,
                settings,
                self._devices,
                self._partition,
                weights=skeleton,
                dtype=self._dtype,
                threads_per_device=self._threads,
            )
            analysis = analyse(number, recording, inputs, self.plan)
            self.owners = analysis.partition
        else:
            assert self.plan is not None
            analysis = analyse_again(number, recording, inputs, self.plan, self.owners)
        if skeleton is not self._installed:
            self._install(skeleton, analysis, settings, groups)
            self._installed = skeleton
        groups.prepare(number, analysis.specs, analysis.wiring, tuple(self._retired))
        self._retired.clear()
        return analysis

    def _install(self, skeleton: Skeleton, analysis: Analysis, settings: Settings, groups: Groups) -> None:
        replicated = analysis.partition.replicated_stage
        rank_stages = (*range(settings.num_stages), *(replicated for _ in range(settings.stride - 1)))
        tensors = {stage: spec.tensors for stage, spec in analysis.specs.items()}
        groups.install(self._denoiser, skeleton, rank_stages, tensors)

    def _current_skeleton(self) -> Skeleton:
        self._skeleton = self._skeleton or self._dump()
        return self._skeleton

    def _dump(self) -> Skeleton:
        # What was done by functions instead of the guarded methods, or by putting something in their place.
        refuse_compiled(getattr(self._pipe, self._name, self._denoiser))
        refuse_offloading(self._pipe, self._denoiser)
        refuse_other_ways(self._denoiser)
        with interrupts_deferred():  # the pickler of CPython swallows a Ctrl-C that comes at some moments
            return dump_skeleton(
                self._denoiser, omit=("forward", "cache_context", *guard_names()), allow_main=not self._ships
            )

    def _forget(self) -> None:
        self.analyses.clear()
        self._shared_batches.clear()


def _all_arrived(inputs: Inputs) -> Inputs:
    """The inputs with what is still being computed elsewhere waited for."""
    return replace(inputs, leaves=tuple(map(arrived, inputs.leaves)))

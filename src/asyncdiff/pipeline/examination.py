"""Whether a denoiser can be divided, and where it would be cut: found out without its weights if possible."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from asyncdiff.config import Settings
from asyncdiff.graph import BlockGraph
from asyncdiff.pipeline.analysis import first_plan, record_call
from asyncdiff.pipeline.denoiser import capture_call, denoisers_of
from asyncdiff.planner import Plan
from asyncdiff.trace import Inputs, Recording, find_blocks, flatten_inputs
from asyncdiff.weights import Skeleton, dump_skeleton

_PICTURE_SIDE = 512
# Any rate will do: only ratios decide where a cut goes.
_FLOPS_PER_S = 1e14


@dataclass(frozen=True)
class Examination:
    """One recorded call of a denoiser. `dtype`: of its weights."""

    recording: Recording
    weights: Skeleton
    dtype: torch.dtype

    def plan(self, num_stages: int, devices: Sequence[str], *, by_flops: bool = False) -> Plan:
        """What `parallelize` would choose for devices of this kind.

        `by_flops`: as if memory traffic took no time, so that the cut is the same on every kind of device.
        `UnsupportedDenoiserError` if there is nothing to cut, or not so often.
        """
        seconds = {
            call.key: flops / _FLOPS_PER_S
            for call, (flops, _) in zip(self.recording.calls, self.recording.work, strict=True)
        }
        return first_plan(
            self.recording,
            Settings(num_stages),
            devices,
            None,
            weights=self.weights,
            dtype=self.dtype,
            threads_per_device=None,
            seconds=seconds if by_flops else None,
        )

    def graph(self, plan: Plan) -> BlockGraph:
        """The blocks that the plan names."""
        paths = [name.partition("#")[0] for names in plan.stages for name in names]
        return find_blocks(self.recording, block_paths=list(dict.fromkeys(paths)))

    def flops_imbalance(self, plan: Plan) -> float:
        """By how much the largest stage's FLOPs exceed an even share of them, relatively."""
        graph = self.graph(plan)
        flops = {block.key: block.flops for block in graph.blocks}
        stages = [sum(flops[key] for key in keys) for keys in plan.partition(graph).stages]
        return max(stages) * len(stages) / sum(stages) - 1.0

    @property
    def parameter_bytes(self) -> int:
        """Of the whole denoiser."""
        return sum(spec.num_bytes for spec in self.weights.specs.values())


def examine(denoiser: nn.Module, inputs: Inputs, *, weights_at_hand: bool) -> Examination:
    """Record a call; `UnsupportedDenoiserError` names the module in the way.

    `weights_at_hand`: the denoiser has its weights and is run itself where a weightless copy is not enough.
    """
    skeleton = dump_skeleton(denoiser, allow_main=True)
    recording = record_call(denoiser, skeleton, inputs, torch.device("cpu"), weights_at_hand=weights_at_hand)
    return Examination(recording, skeleton, next(denoiser.parameters()).dtype)


def examine_pipeline(pipe: Any, *, weights_at_hand: bool) -> Examination:
    """`examine` the pipeline's (first) denoiser, with the inputs that an example call gives it.

    Of a pipeline without weights (`asyncdiff.pipeline.weightless`), or a loaded one. Raises what the call
    raises.
    """
    denoiser = next(iter(denoisers_of(pipe).values()))
    args, kwargs = _captured(pipe)
    inputs = flatten_inputs(type(denoiser).forward, args, kwargs)
    inputs = replace(inputs, leaves=tuple(map(_with_values, inputs.leaves)))
    return examine(denoiser, inputs, weights_at_hand=weights_at_hand)


def example_calls(pipe: Any) -> Iterator[dict[str, Any]]:
    """Arguments for a call of the pipeline: an empty prompt, then with pictures for what takes some."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    required = {name for name, each in parameters.items() if each.default is inspect.Parameter.empty}
    examples = _examples()
    known = {name: examples[name] for name in parameters if name in examples}
    least = {name: value for name, value in known.items() if name == "prompt" or name in required}
    yield least
    if known.keys() != least.keys():
        yield known


def _examples() -> dict[str, Any]:
    from PIL import Image

    picture = Image.new("RGB", (_PICTURE_SIDE, _PICTURE_SIDE))
    pictures = dict.fromkeys(("image", "control_image"), picture)
    return {"prompt": "", **pictures, "mask_image": picture.convert("L"), "video": [picture] * 8}


def _captured(pipe: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    failures: list[Exception] = []
    for call in example_calls(pipe):
        try:
            return capture_call(pipe, denoisers_of(pipe).values(), call)
        except Exception as error:  # noqa: BLE001  whatever a pipeline says to arguments that it does not like
            failures.append(error)
    raise failures[-1]


def _with_values(leaf: Any) -> Any:
    """Zeros in the place of what text encoders without weights returned."""
    if isinstance(leaf, torch.Tensor) and type(leaf) is not torch.Tensor:
        return torch.zeros(leaf.shape, dtype=leaf.dtype)
    return leaf

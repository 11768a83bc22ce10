"""Whether a denoiser can be divided, and where it would be cut: found out without its weights if possible."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from asyncdiff.config import Settings
from asyncdiff.errors import ConfigurationError
from asyncdiff.graph import BlockGraph, BlockKey
from asyncdiff.guidance import PartsMemory, find_shared_batch
from asyncdiff.pipeline.analysis import first_plan, record_call
from asyncdiff.pipeline.denoiser import capture_call, denoisers_of
from asyncdiff.planner import Plan
from asyncdiff.planner.costs import rates_of
from asyncdiff.trace import Inputs, Recording, find_blocks, flatten_inputs
from asyncdiff.trace.costs import subtree_costs
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
        return self.plan_with(Settings(num_stages), devices, seconds=seconds if by_flops else None)

    def plan_with(
        self,
        settings: Settings,
        devices: Sequence[str],
        *,
        threads_per_device: int | None = None,
        seconds: Mapping[BlockKey, float] | None = None,
        driver_seconds: float | None = None,
        speeds: Sequence[float] | None = None,
        max_weight_bytes: float = math.inf,
    ) -> Plan:
        """The plan for these settings; the other arguments as `first_plan` takes them."""
        return first_plan(
            self.recording,
            settings,
            devices,
            None,
            weights=self.weights,
            dtype=self.dtype,
            threads_per_device=threads_per_device,
            seconds=seconds,
            driver_seconds=driver_seconds,
            speeds=speeds,
            max_weight_bytes=max_weight_bytes,
        )

    def complete_seconds(self, given: Mapping[str, float], device_kind: str) -> dict[BlockKey, float]:
        """Seconds of every call from those of some, by name (`path`, or `path#1` for its second call).

        Calls that are not given take their estimate, scaled as what was given around them is against its own.
        `ConfigurationError` for a name that is no call of the denoiser.
        """
        keys = {str(call.key): call.key for call in self.recording.calls}
        keys |= {f"{key.path}#{key.call}": key for key in keys.values()}
        for name in given:
            if name not in keys:
                close = difflib.get_close_matches(name, keys, n=3)
                raise ConfigurationError(
                    f"Seconds are given for {name!r}, which the denoiser does not call."
                    + (f" Perhaps {' or '.join(close)}?" if close else "")
                )
        rates = rates_of(device_kind, str(self.dtype).removeprefix("torch."))
        known = {keys[name]: seconds for name, seconds in given.items()}
        costs = subtree_costs(self.recording, known, rates.seconds)
        filled = {call.key: cost for call, cost in zip(self.recording.calls, costs, strict=True)}
        whole = self.recording.calls[0].key
        if whole not in known:  # an estimate of the whole less given blocks is none of what is around them
            del filled[whole]
        return filled

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
        return self.weights.num_bytes


def examine(denoiser: nn.Module, inputs: Inputs, *, weights_at_hand: bool) -> Examination:
    """Record a call; `UnsupportedDenoiserError` names the module in the way.

    `weights_at_hand`: the denoiser has its weights and is run itself where a weightless copy is not enough.
    """
    skeleton = dump_skeleton(denoiser, allow_main=True)
    recording = record_call(denoiser, skeleton, inputs, torch.device("cpu"), weights_at_hand=weights_at_hand)
    return Examination(recording, skeleton, next(denoiser.parameters()).dtype)


def examine_part(
    denoiser: nn.Module, inputs: Inputs, *, weights_at_hand: bool
) -> tuple[Examination, Inputs] | None:
    """`examine` one of two parts of the batch, with its inputs; None where the batch cannot be shared."""
    skeleton = dump_skeleton(denoiser, allow_main=True)
    shared = find_shared_batch(skeleton, inputs, 2, torch.device("cpu"))
    if shared is None:
        return None
    part = PartsMemory().parts(inputs, shared)[0]
    return examine(denoiser, part, weights_at_hand=weights_at_hand), part


def examine_pipeline(pipe: Any, *, weights_at_hand: bool, size: int | None = None) -> Examination:
    """`examine` the pipeline's (first) denoiser, with the inputs that an example call gives it.

    Of a pipeline without weights (`asyncdiff.pipeline.weightless`), or a loaded one. `size`: height and width
    in pixels, None for its own. Raises what the call raises.
    """
    denoiser, inputs = example_denoiser_call(pipe, size)
    return examine(denoiser, inputs, weights_at_hand=weights_at_hand)


def example_denoiser_call(pipe: Any, size: int | None = None) -> tuple[nn.Module, Inputs]:
    """The pipeline's (first) denoiser, and inputs with values that an example call gives it."""
    _, inputs = example_inputs(pipe, size)
    inputs = replace(inputs, leaves=tuple(map(with_values, inputs.leaves)))
    return next(iter(denoisers_of(pipe).values())), inputs


def example_inputs(pipe: Any, size: int | None = None) -> tuple[dict[str, Any], Inputs]:
    """An example call of the pipeline, and what it calls its first denoiser with. Raises what it raises."""
    denoisers = denoisers_of(pipe)
    failures: list[Exception] = []
    for call in example_calls(pipe, size):
        try:
            args, kwargs = capture_call(pipe, denoisers.values(), call)
        except Exception as error:  # noqa: BLE001  whatever a pipeline says to arguments that it does not like
            failures.append(error)
        else:
            return call, flatten_inputs(type(next(iter(denoisers.values()))).forward, args, kwargs)
    raise failures[-1]


def example_calls(pipe: Any, size: int | None = None) -> Iterator[dict[str, Any]]:
    """Arguments for a call of the pipeline: an empty prompt, then with pictures for what takes some.

    `ConfigurationError` where it has no say in the `size`.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    sizes = {} if size is None else {"height": size, "width": size}
    if not sizes.keys() <= parameters.keys():
        raise ConfigurationError(
            f"{type(pipe).__name__} takes no height and width: leave the size out, it has its own."
        )
    required = {name for name, each in parameters.items() if each.default is inspect.Parameter.empty}
    examples = _examples()
    known = {name: examples[name] for name in parameters if name in examples}
    least = {name: value for name, value in known.items() if name == "prompt" or name in required}
    yield least | sizes
    if known.keys() != least.keys():
        yield known | sizes


def _examples() -> dict[str, Any]:
    from PIL import Image

    picture = Image.new("RGB", (_PICTURE_SIDE, _PICTURE_SIDE))
    pictures = dict.fromkeys(("image", "control_image"), picture)
    return {"prompt": "", **pictures, "mask_image": picture.convert("L"), "video": [picture] * 8}


def with_values(leaf: Any) -> Any:
    """Zeros in the place of what text encoders without weights returned."""
    if isinstance(leaf, torch.Tensor) and type(leaf) is not torch.Tensor:
        return torch.zeros(leaf.shape, dtype=leaf.dtype)
    return leaf

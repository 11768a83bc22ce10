"""Every denoiser of a pipeline examined, also those that come after another one in its call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from asyncdiff.errors import ConfigurationError, UnsupportedDenoiserError
from asyncdiff.pipeline.denoiser import (
    CapturedCall,
    capture_call,
    denoisers_of,
    refuse_int8,
    replaced_forward,
)
from asyncdiff.pipeline.examination import Examination, examine, example_calls, with_values
from asyncdiff.stage import OutputSpec, output_spec
from asyncdiff.trace import Inputs, flatten_inputs
from asyncdiff.trace.tensors import zero_placeholder


def examine_denoisers(pipe: Any, *, weights_at_hand: bool) -> dict[str, Examination | Exception]:
    """`examine` every denoiser of the pipeline with the inputs of an example call, by name.

    One that has been examined predicts zeros from then on, so that the call comes to the next. Where one
    cannot be divided, or the example call fails, that error takes the place of its examination and of those
    that the call has not come to.
    """
    missing = denoisers_of(pipe)
    found: dict[str, Examination | Exception] = dict.fromkeys(missing, ConfigurationError())
    with ExitStack() as stack:
        while missing:
            try:
                name, inputs = _first_call(pipe, missing)
            except Exception as error:  # noqa: BLE001  whatever a pipeline says to what it does not like
                return found | dict.fromkeys(missing, error)
            denoiser = missing.pop(name)
            try:
                refuse_int8(denoiser)
                examination = examine(denoiser, inputs, weights_at_hand=weights_at_hand)
            except Exception as error:  # noqa: BLE001  as above: what it is called with may not suit it
                reason = UnsupportedDenoiserError(f"It was not looked at, because {name} comes first.")
                return found | {name: error} | dict.fromkeys(missing, reason)
            found[name] = examination
            stack.enter_context(replaced_forward(denoiser, _Zeros(output_spec(examination.recording))))
    return found


class _Zeros:
    """In the place of a forward."""

    def __init__(self, output: OutputSpec) -> None:
        self._output = output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._output.rebuild(
            [zero_placeholder(spec, torch.device("cpu")) for spec in self._output.tensors]
        )


def _first_call(pipe: Any, denoisers: Mapping[str, nn.Module]) -> tuple[str, Inputs]:
    """Which of these the pipeline calls first, and with what; raises what its last example call raises."""
    failures: list[Exception] = []
    called: list[str] = []

    def stop_at(name: str) -> Callable[..., None]:
        def stop(*args: Any, **kwargs: Any) -> None:
            called.append(name)
            raise CapturedCall(args, kwargs)

        return stop

    with ExitStack() as stack:
        for name, denoiser in denoisers.items():
            stack.enter_context(replaced_forward(denoiser, stop_at(name)))
        for call in example_calls(pipe):
            try:
                args, kwargs = capture_call(pipe, (), call)
            except Exception as error:  # noqa: BLE001  as above
                failures.append(error)
                continue
            inputs = flatten_inputs(type(denoisers[called[0]]).forward, args, kwargs)
            return called[0], replace(inputs, leaves=tuple(map(with_values, inputs.leaves)))
    raise failures[-1]

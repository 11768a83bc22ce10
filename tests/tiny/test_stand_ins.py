"""A stand-in in which an input has no effect would hide a mistake with that input."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from typing import Any

import pytest
import torch

from asyncdiff import tiny
from asyncdiff.pipeline.denoiser import capture_call
from asyncdiff.pipeline.run_state import timestep_argument
from asyncdiff.pipeline.timesteps import timestep_name
from asyncdiff.tiny import TINY_PIPELINES, TinyCall
from asyncdiff.trace import Inputs, flatten_inputs


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_timestep_matters(name: str) -> None:
    family = TINY_PIPELINES[name]
    pipe = family.build()
    denoiser = getattr(pipe, family.denoisers[0])
    args, kwargs = capture_call(pipe, [denoiser], family.arguments(TinyCall()))
    inputs = flatten_inputs(type(denoiser).forward, args, kwargs)
    argument, timestep = timestep_name(inputs.names), timestep_argument(inputs)
    predictions = [
        predict(denoiser, inputs, {argument: value}) for value in (timestep, timestep * 0.5 + 0.25)
    ]
    assert (predictions[0] - predictions[1]).abs().max() > 1e-4 * predictions[0].abs().max()


def test_registry_names_what_the_files_hold() -> None:
    modules = [
        importlib.import_module(each.name) for each in pkgutil.iter_modules(tiny.__path__, "asyncdiff.tiny.")
    ]
    families = [family for module in modules for family in getattr(module, "FAMILIES", ())]
    assert [TINY_PIPELINES[family.name] for family in families] == families
    assert sorted(TINY_PIPELINES) == sorted(family.name for family in families)


def test_no_pipeline_is_imported_before_it_is_asked_for() -> None:
    code = """
import sys
from asyncdiff.tiny import TINY_PIPELINES
from asyncdiff.tiny.noise_schedulers import SCHEDULER_CASES
assert len(TINY_PIPELINES) == len(set(TINY_PIPELINES)) > 40
assert not {"diffusers", "transformers"} & sys.modules.keys()
TINY_PIPELINES["omnigen"]
assert "asyncdiff.tiny.omnigen" in sys.modules
assert "asyncdiff.tiny.flux" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def predict(denoiser: Any, inputs: Inputs, changes: dict[str, Any]) -> torch.Tensor:
    """The first tensor that the denoiser returns for the call with other leaves."""
    with torch.no_grad():
        output = denoiser(**inputs.rebuild(changes))
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output

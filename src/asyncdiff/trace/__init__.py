"""Splitting a denoiser without per-model code: one recording forward, and pure functions of what it recorded.

`record` runs the forward once (on fake tensors where possible, so without weights), `find_blocks` chooses the
blocks and says what each reads. What cannot be split is refused by name with `UnsupportedDenoiserError`.
"""

from asyncdiff.trace.costs import CallCost
from asyncdiff.trace.granularity import paths_below
from asyncdiff.trace.inputs import Inputs, InputsSpec, flatten_inputs
from asyncdiff.trace.opening import call_costs, find_blocks, reown
from asyncdiff.trace.recorder import record
from asyncdiff.trace.recording import Recording
from asyncdiff.trace.torch_private import quiet_failures_of_fake_tensors

__all__ = [
    "CallCost",
    "Inputs",
    "InputsSpec",
    "Recording",
    "call_costs",
    "find_blocks",
    "flatten_inputs",
    "paths_below",
    "quiet_failures_of_fake_tensors",
    "record",
    "reown",
]

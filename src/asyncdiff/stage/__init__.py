"""Running one stage: a copy of the denoiser whose foreign blocks are stubs.

`stage_spec` says what a stage does (pure, small, picklable); `StageReplica` does it.
"""

from asyncdiff.stage.planning import output_spec, stage_spec
from asyncdiff.stage.replica import AS_THEY_ARE, BlockExecution, StageReplica
from asyncdiff.stage.spec import OutputSpec, StageSpec

__all__ = [
    "AS_THEY_ARE",
    "BlockExecution",
    "OutputSpec",
    "StageReplica",
    "StageSpec",
    "output_spec",
    "stage_spec",
]

"""Running one stage: a copy of the denoiser whose foreign blocks are stubs.

`stage_spec` says what a stage does (pure, small, picklable); `StageReplica` does it.
"""

from asyncdiff.stage.planning import output_spec, stage_spec
from asyncdiff.stage.replica import StageReplica
from asyncdiff.stage.spec import OutputSpec, StageSpec

__all__ = ["OutputSpec", "StageReplica", "StageSpec", "output_spec", "stage_spec"]

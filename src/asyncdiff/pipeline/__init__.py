"""The user's side: `parallelize` a diffusers pipeline, and the handle it returns."""

from asyncdiff.pipeline.front_door import handle_of, parallelize, plan
from asyncdiff.pipeline.handle import Handle, WorkerInfo
from asyncdiff.pipeline.pretrained import from_pretrained
from asyncdiff.pipeline.report import RunReport
from asyncdiff.planner import Plan

__all__ = ["Handle", "Plan", "RunReport", "WorkerInfo", "from_pretrained", "handle_of", "parallelize", "plan"]

"""The user's side: `parallelize` a diffusers pipeline, and the handle it returns."""

from asyncdiff.pipeline.front_door import parallelize, plan
from asyncdiff.pipeline.handle import Handle, WorkerInfo
from asyncdiff.pipeline.report import RunReport
from asyncdiff.planner import Plan

__all__ = ["Handle", "Plan", "RunReport", "WorkerInfo", "parallelize", "plan"]

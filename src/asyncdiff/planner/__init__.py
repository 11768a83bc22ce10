"""Numbers in, plan out: costs, cut points, partitions, plans and what they predict. Pure."""

from asyncdiff.planner.candidates import (
    USUAL_STALENESS,
    Candidate,
    ControlNetCandidates,
    Objective,
    choose_candidate,
    explain_choice,
    list_candidates,
)
from asyncdiff.planner.choice import choose_plan
from asyncdiff.planner.controlnet import ControlNetCost, seconds_before_reading, step_seconds
from asyncdiff.planner.costs import estimate_seconds, glue_seconds
from asyncdiff.planner.names import block_name, partition_by_names
from asyncdiff.planner.partitioning import (
    check_speeds,
    partition_chain,
    partition_nested,
    share_used_by_groups,
    stage_speeds,
)
from asyncdiff.planner.plan import Plan, make_plan
from asyncdiff.planner.predictions import Predictions, predict
from asyncdiff.planner.timing import simulate

__all__ = [
    "USUAL_STALENESS",
    "Candidate",
    "ControlNetCandidates",
    "ControlNetCost",
    "Objective",
    "Plan",
    "Predictions",
    "block_name",
    "check_speeds",
    "choose_candidate",
    "choose_plan",
    "estimate_seconds",
    "explain_choice",
    "glue_seconds",
    "list_candidates",
    "make_plan",
    "partition_by_names",
    "partition_chain",
    "partition_nested",
    "predict",
    "seconds_before_reading",
    "share_used_by_groups",
    "simulate",
    "stage_speeds",
    "step_seconds",
]

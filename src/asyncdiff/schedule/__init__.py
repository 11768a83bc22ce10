"""Who computes, sends and reads which value when.

Pure data: built, validated, simulated and printed ahead of time; the runtime only interprets it.
"""

from asyncdiff.schedule.builder import build_schedule
from asyncdiff.schedule.ops import Compute, Op, Predict, Read, Recv, Send, SendPrediction, Term, Value
from asyncdiff.schedule.rendering import render
from asyncdiff.schedule.rounds import Round, Schedule
from asyncdiff.schedule.serialization import from_dict, to_dict
from asyncdiff.schedule.staleness import StepStaleness, staleness
from asyncdiff.schedule.validation import ScheduleError, validate

__all__ = [
    "Compute",
    "Op",
    "Predict",
    "Read",
    "Recv",
    "Round",
    "Schedule",
    "ScheduleError",
    "Send",
    "SendPrediction",
    "StepStaleness",
    "Term",
    "Value",
    "build_schedule",
    "from_dict",
    "render",
    "staleness",
    "to_dict",
    "validate",
]

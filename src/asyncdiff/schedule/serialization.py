"""A schedule as a dict of JSON values, and back."""

from __future__ import annotations

from typing import Any

from asyncdiff.errors import ConfigurationError
from asyncdiff.schedule.ops import Compute, Op, Predict, Read, Recv, Send, SendPrediction, Term, Value
from asyncdiff.schedule.rounds import Round, Schedule

FORMAT_VERSION = 5
_SETTINGS = (
    "kind", "num_stages", "stride", "warmup_steps", "num_steps", "first_step", "time_shift", "forecast",
    "freshness", "driver_computes", "refresh_every",
)  # fmt: skip


def to_dict(schedule: Schedule) -> dict[str, Any]:
    """Lists, dicts, strings and numbers only; `from_dict` gives an equal schedule back."""
    return {
        "format_version": FORMAT_VERSION,
        **{name: getattr(schedule, name) for name in _SETTINGS},
        "segment_stage": list(schedule.segment_stage),
        "rounds": [_round_to_dict(round_) for round_ in schedule.rounds],
    }


def from_dict(data: dict[str, Any]) -> Schedule:
    """The schedule that `to_dict` wrote; `ConfigurationError` for another format version."""
    if data.get("format_version") != FORMAT_VERSION:
        raise ConfigurationError(
            f"This schedule has format version {data.get('format_version')!r}, but {FORMAT_VERSION} is known."
        )
    return Schedule(
        **{name: data[name] for name in _SETTINGS},
        segment_stage=tuple(data["segment_stage"]),
        rounds=tuple(_round_from_dict(round_) for round_ in data["rounds"]),
    )


def _round_to_dict(round_: Round) -> dict[str, Any]:
    return {
        "steps": list(round_.steps),
        "in_order": round_.in_order,
        "ops": [[_op_to_dict(op) for op in ops] for ops in round_.ops],
    }


def _round_from_dict(data: dict[str, Any]) -> Round:
    steps = tuple(data["steps"])
    ops = tuple(tuple(_op_from_dict(op) for op in ops) for ops in data["ops"])
    return Round(steps[0], steps, data["in_order"], ops)


def _op_to_dict(op: Op) -> dict[str, Any]:
    if isinstance(op, Compute):
        return {
            "op": "compute", "segment": op.segment, "step": op.step, "value": list(op.value),
            "input_step": op.input_step, "latents_step": op.latents_step,
            "condition_step": op.condition_step,
            "reads": [_read_to_dict(read) for read in op.reads],
        }  # fmt: skip
    if isinstance(op, Send):
        return {"op": "send", "value": list(op.value), "to_rank": op.to_rank}
    if isinstance(op, Recv):
        return {"op": "recv", "value": list(op.value), "from_rank": op.from_rank}
    if isinstance(op, SendPrediction):
        return {"op": "send_prediction", "step": op.step}
    return {"op": "predict", "step": op.step, "from_rank": op.from_rank}


def _op_from_dict(data: dict[str, Any]) -> Op:
    kind = data["op"]
    if kind == "compute":
        reads = tuple(_read_from_dict(read) for read in data["reads"])
        numbers = (data["input_step"], data["latents_step"], data["condition_step"])
        return Compute(data["segment"], data["step"], Value(*data["value"]), *numbers, reads)
    if kind == "send":
        return Send(Value(*data["value"]), data["to_rank"])
    if kind == "recv":
        return Recv(Value(*data["value"]), data["from_rank"])
    if kind == "send_prediction":
        return SendPrediction(data["step"])
    if kind == "predict":
        return Predict(data["step"], data["from_rank"])
    raise ConfigurationError(f"The schedule has an unknown operation {kind!r}.")


def _read_to_dict(read: Read) -> dict[str, Any]:
    terms = [[*term.value, term.weight] for term in read.terms]
    return {"segment": read.segment, "terms": terms, "fresh": read.fresh, "damped": read.damped}


def _read_from_dict(data: dict[str, Any]) -> Read:
    terms = tuple(Term(Value(segment, step), weight) for segment, step, weight in data["terms"])
    return Read(data["segment"], terms, data["fresh"], data["damped"])

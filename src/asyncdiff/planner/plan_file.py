"""The JSON form of a plan: versioned, and made to be edited by people, so mistakes are named, not guessed.

Values are only read as the kind of thing they must be; whether they fit each other is for `Plan` to say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from asyncdiff.errors import ConfigurationError
from asyncdiff.planner.predictions import Predictions

FORMAT_VERSION = 1


def fields_to_json(plan_fields: Mapping[str, Any]) -> str:
    """JSON text of a plan's fields, one block name per line."""
    return json.dumps({"format_version": FORMAT_VERSION, **plan_fields}, indent=2) + "\n"


def fields_from_json(text: str) -> dict[str, Any]:
    """A plan's fields; `ConfigurationError` for invalid JSON, other versions, unknown or missing keys, and
    values that are not the kind of thing they must be."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"The plan is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigurationError("A plan must be a JSON object.")
    version = data.pop("format_version", None)
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ConfigurationError(
            f"The plan has format version {version!r}, but this version of asyncdiff reads {FORMAT_VERSION}."
        )
    return _read_object(
        "The plan",
        data,
        _PLAN,
        required=_PLAN.keys()
        - {
            "threads_per_device",
            "predictions",
            "freshness",
            "fresh",
            "tolerance",
            "groups",
            "guidance_refresh",
        },
    )


def _read_object(
    what: str,
    data: Mapping[str, Any],
    readers: Mapping[str, Callable[[str, Any], Any]],
    required: Collection[str],
) -> dict[str, Any]:
    unknown, missing = sorted(data.keys() - readers.keys()), sorted(set(required) - data.keys())
    if unknown:
        raise ConfigurationError(f"{what} has unknown keys {unknown}. Known are {sorted(readers)}.")
    if missing:
        raise ConfigurationError(f"{what} lacks the keys {missing}.")
    return {name: readers[name](name, value) for name, value in data.items()}


def _exactly(kind: type) -> Callable[[str, Any], Any]:
    def read(name: str, value: Any) -> Any:
        # bool is a subclass of int; JSON's true is no number.
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ConfigurationError(f"In the plan, {name} must be of type {kind.__name__}, not {value!r}.")
        return value

    return read


def _list_of(read_item: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    def read(name: str, value: Any) -> Any:
        if not isinstance(value, list):
            raise ConfigurationError(f"In the plan, {name} must be a list, not {value!r}.")
        return tuple(read_item(f"an entry of {name}", item) for item in value)

    return read


def _tuple_of(*read_items: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    def read(name: str, value: Any) -> Any:
        if not isinstance(value, list) or len(value) != len(read_items):
            raise ConfigurationError(
                f"In the plan, {name} must be a list of {len(read_items)}, not {value!r}."
            )
        return tuple(
            read_item(f"{name}, place {place}", item)
            for place, (read_item, item) in enumerate(zip(read_items, value, strict=True))
        )

    return read


def _optional(read_value: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else read_value(name, value)


def _read_predictions(name: str, value: Any) -> Predictions:
    if not isinstance(value, dict):
        raise ConfigurationError(f"In the plan, {name} must be an object, not {value!r}.")
    required = _PREDICTIONS.keys() - {"driver_seconds", "speeds", "latents_stages", "fresh_leads"}
    return Predictions(**_read_object(f"The plan's {name}", value, _PREDICTIONS, required))


_PREDICTIONS = {
    "segment_seconds": _list_of(_exactly(float)),
    "stage_seconds": _list_of(_exactly(float)),
    "balance": _exactly(float),
    "ideal_speedup": _exactly(float),
    "crossing_bytes_per_step": _exactly(float),
    "crossing_bytes": _list_of(_list_of(_exactly(int))),
    "prediction_bytes": _exactly(int),
    "parameter_bytes": _list_of(_exactly(int)),
    "driver_seconds": _exactly(float),
    "speeds": _optional(_list_of(_exactly(float))),
    "latents_stages": _optional(_list_of(_exactly(int))),
    "fresh_leads": _list_of(_tuple_of(_exactly(int), _exactly(int), _exactly(float))),
}
_PLAN = {
    "kind": _exactly(str),
    "stages": _list_of(_list_of(_exactly(str))),
    "devices": _list_of(_exactly(str)),
    "stride": _exactly(int),
    "warmup_steps": _exactly(int),
    "time_shift": _exactly(bool),
    "forecast": _exactly(str),
    "freshness": _exactly(str),
    "tolerance": _optional(_exactly(float)),
    "fresh": _list_of(_tuple_of(_exactly(str), _exactly(int))),
    "threads_per_device": _optional(_exactly(int)),
    "predictions": _optional(_read_predictions),
    "groups": _exactly(int),
    "guidance_refresh": _exactly(int),
}

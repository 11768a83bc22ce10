"""How finely to look at a denoiser: every container that is large in work or weights is opened."""

from __future__ import annotations

from collections.abc import Mapping

from asyncdiff.graph import BlockKey
from asyncdiff.trace.costs import CallCost, EstimateCost
from asyncdiff.trace.recording import paths_above


def paths_below(
    calls: Mapping[BlockKey, CallCost],
    weight_bytes: Mapping[str, int],
    *,
    max_share: float,
    seconds: Mapping[BlockKey, float] | None,
    cost: EstimateCost,
) -> list[str]:
    """Module paths for `find_blocks`: candidates (`call_costs`) opened until none is above `max_share` of the
    cost or of the weights, or has nothing inside to be cut at.

    `weight_bytes`: of every parameter and buffer by dotted name. `seconds` where measured, else `cost`.
    """
    costs = {
        key: (seconds or {}).get(key, 0.0) or cost(call.flops, call.memory_bytes)
        for key, call in calls.items()
    }
    children: dict[BlockKey | None, list[BlockKey]] = {}
    for key, call in calls.items():
        children.setdefault(call.parent, []).append(key)
    total_cost = sum(costs[key] for key in children.get(None, ()))
    total_bytes = sum(weight_bytes.values())
    bytes_below: dict[str, int] = {}
    for name, size in weight_bytes.items():
        for path in paths_above(name):
            bytes_below[path] = bytes_below.get(path, 0) + size

    def share(key: BlockKey) -> float:
        return max(costs[key] / total_cost, bytes_below.get(key.path, 0) / total_bytes)

    def opened(keys: list[BlockKey]) -> list[str]:
        found: list[str] = []
        for key in keys:
            inside = children.get(key, [])
            found += opened(inside) if inside and share(key) > max_share else [key.path]
        return found

    return list(dict.fromkeys(opened(children.get(None, []))))

"""How finely to look at a denoiser: every container that is large in work or weights is opened."""

from __future__ import annotations

from collections.abc import Mapping

from asyncdiff.graph import BlockKey
from asyncdiff.trace.costs import CallCost, EstimateCost


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

    def share(key: BlockKey) -> float:
        below = sum(size for name, size in weight_bytes.items() if name.startswith(f"{key.path}."))
        return max(costs[key] / total_cost, below / total_bytes)

    def opened(keys: list[BlockKey]) -> list[str]:
        found: list[str] = []
        for key in keys:
            inside = children.get(key, [])
            found += opened(inside) if inside and share(key) > max_share else [key.path]
        return found

    return list(dict.fromkeys(opened(children.get(None, []))))

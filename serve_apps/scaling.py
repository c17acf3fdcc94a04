"""How many replicas there should be, by what replicas say of themselves: Serve does not see what
comes over the link. Serve's controller asks; knows numbers, and loads nothing of the app.

Serve adds its own rule for a deployment without replicas: a call that waits for one starts one.
"""

from __future__ import annotations

import math
from typing import Any

TEXTS = "texts"
"""Of a target: texts in progress or waiting."""
SESSIONS = "sessions"
"""Of a draft: texts that it was asked to draft for."""
UTILISATION = "utilisation"
"""Of a draft: share of the time that it spent on trees that targets waited for."""
LATENESS = "lateness"
"""Of a draft: share of those trees whose targets went on without them."""
BUSY = 0.7
"""Utilisation up to which a draft replica answers without much of a queue."""
LATE = 0.25
"""Lateness beyond which another draft replica helps, if this one has several texts."""


def scale_targets(context: Any) -> tuple[int, dict[str, Any]]:
    """As many as their texts fill. `context` is Serve's AutoscalingContext."""
    texts = sum(_metric(context, TEXTS))
    return _bounded(context, texts / context.config.get_target_ongoing_requests()), {}


def scale_drafts(context: Any) -> tuple[int, dict[str, Any]]:
    """As many as their texts fill, or their work, and one more while trees come late; no more than
    there are texts."""
    sessions = sum(_metric(context, SESSIONS))
    late = _metric(context, LATENESS)
    wanted = max(
        sessions / context.config.get_target_ongoing_requests(),
        sum(_metric(context, UTILISATION)) / BUSY,
    )
    if late and sum(late) / len(late) > LATE:
        wanted = max(wanted, len(late) + 1)
    return _bounded(context, min(wanted, math.ceil(sessions))), {}


def _metric(context: Any, name: str) -> list[float]:
    """Of each replica that has reported it."""
    return list((context.aggregated_metrics or {}).get(name, {}).values())


def _bounded(context: Any, wanted: float) -> int:
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(least, min(most, math.ceil(wanted)))

"""Custom routing: change what the experts receive while a context is open.

Example::

    with replace_router(model, cumulative_mass(0.5)):
        model(**inputs)
"""

from __future__ import annotations

from moe_trace.routing.replace import Renormalise, RoutingRule, replace_router
from moe_trace.routing.rules import confidence_threshold, cumulative_mass, drop_over_capacity, top_k

__all__ = [
    "Renormalise",
    "RoutingRule",
    "confidence_threshold",
    "cumulative_mass",
    "drop_over_capacity",
    "replace_router",
    "top_k",
]

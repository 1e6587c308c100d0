"""Layers of one file that hold what another file has in the layer beside."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.compare.align import align
from moe_trace.read.routes.overlap import shared_experts

_SAMPLE = 4096
_BETTER = 0.25
"""Of k: how much more must be shared with another layer than with the layer's own."""


def moved_layers(routes: RecordedRoutes, reference: RecordedRoutes) -> Iterator[tuple[int, np.ndarray, str]]:
    """(layer, its rows, message) where a layer shares clearly more experts with another of the reference.

    Compared is the share of the top-k sets, over up to 4096 tokens.
    """
    aligned = align(routes, reference)
    step = max(1, len(aligned.rows_a) // _SAMPLE)
    rows, others = aligned.rows_a[::step], aligned.rows_b[::step]
    for layer, own in aligned.layers:
        experts, slots = routes.num_experts[layer], routes.top_k[layer]
        mine = routes.expert_ids[rows, layer]
        shares = {
            other: float(shared_experts(mine, reference.expert_ids[others, other], experts).mean()) / slots
            for _, other in aligned.layers
            if reference.num_experts[other] == experts
        }
        best = max(shares, key=shares.__getitem__)
        if shares[best] > shares[own] + _BETTER:
            message = (
                f"{100 * shares[best]:.0f} % of its experts are those of the reference's "
                f"{reference.layers[best]}, {100 * shares[own]:.0f} % those of its own: "
                f"an offset of {best - own:+d} layers"
            )
            yield layer, aligned.rows_a, message

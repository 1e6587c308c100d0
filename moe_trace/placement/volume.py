"""What a plan moves between ranks: slots and bytes of the all-to-all, within nodes and across them.

The model. Each rank holds 1/R of every expert's tokens. Each copy of an expert computes an even share of its
slots. Under both, as many slots as possible stay on their own rank, then on their own node; the rest crosses
nodes. A slot that leaves its rank moves `slot_bytes` to its expert and as many back; a slot moves by itself,
as in transformers' and Megatron's all-to-all (kernels that send a token once to a node move less).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_trace.placement.plan import Floats, Ints, Plan


@dataclass(frozen=True, kw_only=True)
class Routes:
    """Parts of each expert's slots by where they are computed, [L, E]; they add up to 1."""

    own_rank_LE: Floats
    own_node_LE: Floats
    """On another rank of the token's node."""
    other_node_LE: Floats


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Slots by where they are computed, [L]; bytes one way are slots x `slot_bytes`."""

    own_rank_L: Floats
    own_node_L: Floats
    other_node_L: Floats


def routes(plan: Plan) -> Routes:
    """Where slots are computed; a property of the plan alone."""
    cluster = plan.cluster
    supply = 1.0 / cluster.ranks
    demand_LER = plan.shares_LER()
    own_LER = np.minimum(supply, demand_LER)
    by_node = (*own_LER.shape[:2], cluster.nodes, cluster.ranks_per_node)
    left_LEN = (supply - own_LER).reshape(by_node).sum(axis=3)
    wanted_LEN = (demand_LER - own_LER).reshape(by_node).sum(axis=3)
    own_rank = own_LER.sum(axis=2)
    own_node = np.minimum(left_LEN, wanted_LEN).sum(axis=2)
    other = np.maximum(0.0, 1.0 - own_rank - own_node)
    if cluster.nodes == 1:
        own_node, other = 1.0 - own_rank, np.zeros_like(other)
    return Routes(own_rank_LE=own_rank, own_node_LE=own_node, other_node_LE=other)


def volume(found: Routes, counts_SLE: Ints) -> Volume:
    """The slots of all observations, by where they are computed."""
    counts_LE = counts_SLE.sum(axis=0).astype(np.float64)

    def slots(part_LE: Floats) -> Floats:
        total: Floats = (part_LE * counts_LE).sum(axis=1)
        return total

    return Volume(
        own_rank_L=slots(found.own_rank_LE),
        own_node_L=slots(found.own_node_LE),
        other_node_L=slots(found.other_node_LE),
    )

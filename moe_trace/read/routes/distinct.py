"""Distinct experts of a step: the number of experts whose weights a batch of B tokens reads.

The expectation is for B tokens drawn from those of the file (`drawn_distinct`), exact and for every B: a step
of B unrelated sequences. It is compared with what the recorded decode steps used, by their number of tokens.
For consecutive tokens of one sequence see `Locality.distinct_in_window`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_trace.data.calls.sample import STAGES
from moe_trace.data.distinct import drawn_distinct
from moe_trace.data.routes.columns import RecordedRoutes
from moe_trace.read.routes.sets import Floats, Ints, sizes
from moe_trace.read.routes.tokens import LayerTokens

BATCH_MAX = 512


@dataclass(frozen=True, eq=False)
class Distinct:
    """Distinct experts of one layer."""

    expected: Floats
    """[B] mean for 1, 2, ... B tokens drawn from the file, B up to `BATCH_MAX` or the number of tokens."""
    batch_sizes: Ints
    """[M] numbers of tokens of the recorded decode steps."""
    steps: Ints
    """[M] number of such steps."""
    measured: Floats
    """[M] mean number of experts that they used."""


def distinct(routes: RecordedRoutes, tokens: LayerTokens) -> Distinct:
    """Compute the expectation from all stages, and the measurement from decode steps."""
    rows = tokens.order.rows
    decode = np.flatnonzero(routes.stage_codes[rows] == STAGES.index("decode"))
    forward = routes.forward[rows[decode]]
    sorting = np.argsort(forward, kind="stable")
    decode, forward = decode[sorting], forward[sorting]
    starts = np.flatnonzero(np.diff(forward, prepend=forward[:1] - 1))
    batches = np.diff(starts, append=len(forward))
    steps_B = np.bincount(batches)
    unions = np.bitwise_or.reduceat(tokens.sets[decode], starts, axis=0) if len(starts) else tokens.sets[:0]
    used_B = np.bincount(batches, weights=sizes(unions))
    recorded = np.flatnonzero(steps_B)
    return Distinct(
        expected=drawn_distinct(tokens.counts, len(tokens), BATCH_MAX),
        batch_sizes=recorded,
        steps=steps_B[recorded],
        measured=used_B[recorded] / steps_B[recorded],
    )

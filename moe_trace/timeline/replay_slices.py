"""The band of calls that share one place: all layers of a compiled forward, or of one replay of a graph.

One slice a replay, and counters whose names say that they stand for all its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_trace.data.calls.placements import Floats
from moe_trace.timeline.placed_calls import PlacedCalls

REPLAY_NAME = "graph"


@dataclass(frozen=True)
class Replay:
    """The calls of one forward."""

    placed: PlacedCalls
    rows: Sequence[int]
    """Its calls, by layer."""

    @property
    def span(self) -> Floats:
        """[2] start and duration."""
        return self.placed.spans["graph"][self.rows[0]]


def find_replays(placed: PlacedCalls) -> list[Replay]:
    """Calls with the same graph or forward, in order of time."""
    groups: dict[Any, list[int]] = {}
    rows = placed.having("graph")
    calls = placed.calls.take(rows)
    launched = calls.places.span("host", "graph").tolist()
    drawn = placed.spans["graph"][rows].tolist() if len(rows) else []
    for row, thread, host, here in zip(rows.tolist(), calls.thread.tolist(), launched, drawn, strict=True):
        groups.setdefault((thread, *host, *here), []).append(row)
    layer = placed.calls.layer
    replays = [Replay(placed, sorted(group, key=layer.__getitem__)) for group in groups.values()]
    return sorted(replays, key=lambda replay: replay.span[0])


def spans_of(replays: Sequence[Replay]) -> Floats:
    """`[R, 2]` start and duration of each."""
    return np.array([replay.span for replay in replays], np.float64).reshape(-1, 2)


def _known(values: Any, replay: Replay) -> list[float]:
    return [value for value in values[replay.rows].tolist() if value == value]


def _worst(values: Any, replay: Replay) -> float | None:
    return max(_known(values, replay), default=None)


def _mean(values: Any, replay: Replay) -> float | None:
    known = _known(values, replay)
    return sum(known) / len(known) if known else None


REPLAY_FIGURES: dict[str, Callable[[Replay], float | None]] = {
    "load max÷mean (graph: worst layer)": lambda r: _worst(r.placed.loads.max_over_mean, r),
    "load max÷mean (graph: mean)": lambda r: _mean(r.placed.loads.max_over_mean, r),
    "router entropy (nats) (graph: mean)": lambda r: _mean(r.placed.calls.router_entropy, r),
    "active experts (graph: mean)": lambda r: _mean(r.placed.loads.active_experts, r),
}


def replay_args(replay: Replay) -> dict[str, Any]:
    """What a click on a replay shows: a line a layer."""
    first, calls = replay.rows[0], replay.placed.calls
    return {
        "in graph": True,
        "clock": replay.placed.clock(first),
        "step": int(calls.step[first]),
        "stage": str(calls.stage[first]),
        "layers": len(replay.rows),
        **{name: figure(replay) for name, figure in REPLAY_FIGURES.items()},
        **{calls.keys[calls.router[row]].site: _line(replay.placed, row) for row in replay.rows},
    }


def _line(placed: PlacedCalls, row: int) -> str:
    calls, loads = placed.calls, placed.loads
    worst, entropy = loads.max_over_mean[row], calls.router_entropy[row]
    parts = [f"{calls.tokens[row]} tokens", f"{placed.totals[row]} assignments"]
    if worst == worst:
        parts.append(f"load max÷mean {worst:.2f}")
    parts.append(f"{loads.active_experts[row]} active experts")
    if entropy == entropy:
        parts.append(f"entropy {entropy:.3f} nats")
    return ", ".join(parts)

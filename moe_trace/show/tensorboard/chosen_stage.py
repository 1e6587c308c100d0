"""The part of a trace that a view shows: one stage of it where it holds several."""

from __future__ import annotations

from dataclasses import dataclass

from moe_trace.data.schema import Stage
from moe_trace.read.analysis import TraceSummary
from moe_trace.show.tensorboard.catalog import Trace


@dataclass(frozen=True)
class StagePart:
    """What a view shows, and of which trace it is."""

    trace: Trace
    stage: Stage | None
    """None where the trace has no other."""
    summary: TraceSummary


def path_of(stage: str | None) -> str:
    """Where the stage's figures stand in the report's JSON: `` or `stages.prefill.`."""
    return f"stages.{stage}." if stage else ""

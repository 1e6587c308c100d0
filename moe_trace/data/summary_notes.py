"""Sentences for everything that a reader must know before trusting the figures, each with what to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_trace.data.schema import Recording, RouterInfo


def notes_of(recording: Recording) -> list[str]:
    """What was lost, and what is special about the calls and their routers."""
    lost, notes = recording.lost, []
    if lost.never_called:
        notes.append(
            f"{len(lost.never_called)} of {len(recording.routers)} routers were found but never called "
            f"({_first(lost.never_called)}): those layers did not run, or a fused kernel replaced them"
        )
    for name, why in lost.misread.items():
        notes.append(f"{name} was switched off, because its call could not be read: {why}")
    if lost.overwritten:
        notes.append(f"{lost.overwritten} oldest router calls were dropped; raise capacity= or every=")
    if lost.silent_forwards:
        notes.append(
            f"in {lost.silent_forwards} forwards no router call was seen: their compiled code has no hooks, "
            "or they ran no MoE layer; start the tracer before anything is compiled, or call "
            "tracer.recompile()"
        )
    if lost.unreduced:
        notes.append(f"{lost.unreduced} router calls could not be reduced; a warning said why when they were")
    if lost.padding_unknown:
        notes.append(
            f"{lost.padding_unknown} forwards had an attention mask that does not tell padding (4-D, or of a "
            "static cache): their padding counts as 0"
        )
    if lost.samples_without_range:
        notes.append(
            f"{lost.samples_without_range} router calls have no range in the trace; the profiler dropped "
            "events - record fewer steps"
        )
    if lost.ranges_without_sample:
        notes.append(f"{lost.ranges_without_sample} router ranges have no decision kept; raise capacity=")
    notes += _graph_notes(recording)
    nonfinite = recording.calls.total("nonfinite_tokens")
    if nonfinite:
        notes.append(f"{nonfinite} tokens had NaN or infinite router logits; the means leave them out")
    return notes + _router_notes(recording.routers)


def _graph_notes(recording: Recording) -> list[str]:
    """What is known of calls inside graphs, and why there is not more."""
    calls, lost = recording.calls.take(recording.calls.in_graph), recording.lost
    if not len(calls):
        return []
    placed = np.count_nonzero(calls.places.placed)
    timed = np.count_nonzero(~np.isnan(calls.duration_us("device", "router")))
    notes = [
        f"{len(calls)} router calls were made inside compiled code or CUDA graphs: their decisions are "
        f"exact, but padding is not counted apart; {placed} have a place in the trace, that of "
        f"their graph or forward, and {timed} a time of the router itself"
    ]
    notes += [
        f"{count} router calls have no place in the trace: {why}" for why, count in lost.unplaced.items()
    ]
    notes += [f"{count} calls have no router latency: {why}" for why, count in lost.untimed.items()]
    return notes


def _router_notes(routers: Sequence[RouterInfo]) -> list[str]:
    """What is special about routers, once for all that share it."""
    sites: dict[str, list[str]] = {}
    for router in routers:
        for note in router.notes:
            sites.setdefault(note, []).append(router.site)
    return [f"{_first(names)}: {note}" for note, names in sites.items()]


def _first(names: Sequence[str], count: int = 3) -> str:
    shown = ", ".join(names[:count])
    return shown if len(names) <= count else f"{shown}, …"

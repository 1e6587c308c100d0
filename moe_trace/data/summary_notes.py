"""Notes that a reader needs before trusting the numbers, each with what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from moe_trace.data.calls.table import placed_by_clock
from moe_trace.data.schema import Lost, Recording, RouterInfo

LOST_CALLS = {
    "unreadable": "could not be read",
    "without_experts": "were made without their experts, as prefetching does: they assign nothing, so there "
    "is nothing to do",
    "replaced": "were made in blocks whose experts were replaced since the tracer was made; make a new "
    "MoETracer after changing the model",
    "interrupted": "were interrupted before their experts were called, by an error or because recording was "
    "stopped; run those forwards again, whole",
    "unjoined": "could not be joined with their experts, which ran on another thread after their block had "
    "ended, or received none of the router's own tensors, or were computed without being called as in other "
    "forwards; wait for them inside the block, and call them as a module everywhere, or trace either kind of "
    "forward with a MoETracer of its own",
    "rewritten": "were written over before they were read; later ones are copied at once, so run the model "
    "again",
}
"""Reasons why a router call is missing from the recording, other than `overwritten` and `unreduced`."""


def notes_of(recording: Recording) -> list[str]:
    """Return notes on what was lost and on special cases of the calls and their routers."""
    lost, notes = recording.lost, []
    if lost.never_called:
        notes.append(
            f"{len(lost.never_called)} of {len(recording.routers)} routers were found but never called "
            f"({_first_names(lost.never_called)}): those layers did not run, or a fused kernel replaced them"
        )
    for name, why in lost.misread.items():
        notes.append(
            f"calls of {name} could not be read: {why}; teach their form with moe_trace.register_adapter"
        )
    notes += _lost_calls(lost)
    if lost.overwritten:
        notes.append(
            f"{lost.overwritten} oldest router calls were dropped; raise capacity= and capacity_bytes=, or "
            "every="
        )
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
            f"{lost.padding_unknown} forwards had an attention mask that does not tell padding (4-D, of a "
            "static cache, or blocks that are given a part of the tokens): their padding counts as 0; pass a "
            "2-D mask to a model that works on whole batches"
        )
    notes += _trace_notes(recording)
    notes += _graph_notes(recording)
    nonfinite = recording.calls.total("nonfinite_tokens")
    if nonfinite:
        notes.append(f"{nonfinite} tokens had NaN or infinite router logits; the means leave them out")
    return notes + _routes_notes(recording.routes) + _router_notes(recording.routers)


def _routes_notes(routes: str | None) -> list[str]:
    if routes is None:
        return []
    return [
        f"the experts of each token stand in {routes}, from the trace's folder on; `moe-trace routes study` "
        "and `moe-trace routes view` read it"
    ]


def _lost_calls(lost: Lost) -> list[str]:
    notes = []
    for reason, words in LOST_CALLS.items():
        sites = {name: reasons[reason] for name, reasons in lost.calls.items() if reasons.get(reason)}
        if sites and reason != "unreadable":  # a note on `misread` already covers these
            notes.append(f"{sum(sites.values())} router calls ({_first_names(list(sites))}) {words}")
    if lost.not_reached:
        notes.append(
            f"{max(lost.not_reached.values())} forwards did not reach the hooks of {len(lost.not_reached)} "
            f"routers that earlier ones did ({_first_names(list(lost.not_reached))}): their modules were "
            "replaced or not run, or recording was stopped before; make a new MoETracer after changing the "
            "model, and stop it between two forwards"
        )
    if lost.experts_without_router:
        notes.append(
            f"{lost.experts_without_router} calls of experts belong to no router call; call them through "
            "their block"
        )
    if lost.hook_failure:
        notes.append(f"a hook failed ({lost.hook_failure}), so calls may be missing; please report it")
    return notes


def _trace_notes(recording: Recording) -> list[str]:
    lost, by_clock = recording.lost, np.count_nonzero(placed_by_clock(recording.calls))
    notes = [
        f"{count} router calls have no range in the trace: {why}" for why, count in lost.without_range.items()
    ]
    if by_clock:
        notes.append(
            f"{by_clock} router calls stand where the host's clock has them, without their experts and "
            "device times"
        )
    if lost.samples_without_range and not lost.without_range:
        notes.append(
            f"{lost.samples_without_range} router calls have no range in the trace; the release that merged "
            "it does not say why - merge its recording again"
        )
    if lost.ranges_without_sample:
        notes.append(
            f"{lost.ranges_without_sample} router ranges have no decision kept: {_why_undecided(lost)}"
        )
    return notes


def _why_undecided(lost: Lost) -> str:
    if lost.overwritten:
        return "their calls were dropped; raise capacity="
    if sum(sum(reasons.values()) for reasons in lost.calls.values()) >= lost.ranges_without_sample:
        return "their calls were not recorded, as another note tells"
    return (
        "their samples were not among those that were merged, or the tracer was stopped during their "
        "forward; stop it, or leave moe_trace.profile, between two forwards"
    )


def _graph_notes(recording: Recording) -> list[str]:
    """Return notes on calls inside graphs, and why more is not known about them."""
    calls, lost = recording.calls.take(recording.calls.in_graph), recording.lost
    if not len(calls):
        return []
    placed = np.count_nonzero(calls.places.placed)
    timed = max(0, placed - sum(lost.untimed.values()))
    notes = [
        f"{len(calls)} router calls were made inside compiled code or CUDA graphs: their decisions are "
        f"exact, but padding is not counted apart; {placed} have a place in the trace, that of "
        f"their graph or forward, and {timed} a time of the router itself"
    ]
    problems = Counter(graph.problem for graph in recording.compiled_graphs if graph.problem)
    notes += [
        f"phases inside {count} compiled graph{'s' * (count > 1)} are unknown: {problem}"
        for problem, count in problems.items()
    ]
    if recording.graphs_compiled and not recording.compiled_graphs:
        notes.append(
            "phases inside compiled code are unknown, for its kernels lack the compiler's provenance: the "
            "code came from Inductor's cache on disk without it, was compiled before the tracer started, or "
            "in pieces that hold no whole layer, or its routers and experts are no modules (vLLM). Start the "
            "tracer before the first compiled call, and run once with TORCHINDUCTOR_FORCE_DISABLE_CACHES=1"
        )
    notes += [
        f"{count} router calls have no place in the trace: {why}" for why, count in lost.unplaced.items()
    ]
    notes += [f"{count} calls have no router latency: {why}" for why, count in lost.untimed.items()]
    return notes


def _router_notes(routers: Sequence[RouterInfo]) -> list[str]:
    """Return notes on special routers, each once for all routers that share it."""
    sites: dict[str, list[str]] = {}
    for router in routers:
        for note in router.notes:
            sites.setdefault(note, []).append(router.site)
    return [f"{_first_names(names)}: {note}" for note, names in sites.items()]


def _first_names(names: Sequence[str], count: int = 3) -> str:
    shown = ", ".join(names[:count])
    return shown if len(names) <= count else f"{shown}, …"

"""Report what a recording lacks, and router metadata that is known only after calls."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from moe_trace.data.lost_sums import summed
from moe_trace.data.schema import Lost, RouterInfo
from moe_trace.find.private.torch_names import frames_compiled
from moe_trace.record.calls.recorder import Recorder
from moe_trace.record.graphs.compiled import warn_of_silent_forwards
from moe_trace.record.graphs.ring_reader import RingReader
from moe_trace.record.hooks.model import ModelHooks

_FUSED_NOTE = (
    "its block ran fused, without calling router or experts: the decision was computed again from the "
    "block's input and the router's weights, and the router has no latency of its own"
)

_UNREAD_IN_GRAPH = "found another form inside compiled code than its adapter expects"
_ROWS_IN_GRAPH = (
    "found no decision inside compiled code: a gate beside a list of experts is read by the rows that enter "
    "each, which no graph tells. Run those blocks eagerly"
)


def router_infos(hooks: ModelHooks) -> tuple[RouterInfo, ...]:
    """Return the metadata of each router, with a note where its block ran fused."""
    infos = [router.site.info for router in hooks.routers]
    return tuple(
        replace(info, notes=(*info.notes, _FUSED_NOTE)) if counts.fused else info
        for info, counts in zip(infos, hooks.calls.counts, strict=True)
    )


def recorded_calls(hooks: ModelHooks, graphs: RingReader) -> list[int]:
    """Return the number of recorded calls of each router, inside and outside graphs."""
    counts = hooks.calls.counts
    return [state.recorded + in_graphs for state, in_graphs in zip(counts, graphs.calls, strict=True)]


def _silent_forwards(hooks: ModelHooks, graphs: RingReader) -> int:
    """Return the number of recorded forwards in which no hook ran. Hooks that dynamo did not compile in never
    run, and by default it does not check for new ones."""
    if not frames_compiled() or unread_in_graphs(hooks, graphs):
        return 0
    lost = (counts.lost.total() for counts in hooks.calls.counts)  # seen, and reported with a reason
    seen = map(sum, zip(recorded_calls(hooks, graphs), lost, strict=True))
    return max(0, hooks.watch.forwards_recorded - max(seen) - graphs.overwritten)


def unread_in_graphs(hooks: ModelHooks, graphs: RingReader) -> dict[str, str]:
    """Return routers whose compiled call exposes no decision, with the reason for each."""
    rows = list(zip(hooks.routers, hooks.calls.counts, graphs.rings.sites, strict=True))
    if not any(rings.misreads for _, _, rings in rows):
        return {}
    return {
        router.site.name: _ROWS_IN_GRAPH if router.site.listed else _UNREAD_IN_GRAPH
        for router, counts, rings in rows
        # Blocks of one class share their code, so only the first of them was seen during compilation.
        if rings.misreads or (router.site.listed and not counts.seen)
    }


def lost_so_far(hooks: ModelHooks, recorder: Recorder, graphs: RingReader, traces: Collection[Lost]) -> Lost:
    """Return everything missing from the recording; warn once if compiled code runs without hooks.

    Args:
        traces: losses from merging into each trace.
    """
    rows = [
        (router.site.name, counts, in_graphs)
        for router, counts, in_graphs in zip(hooks.routers, hooks.calls.counts, graphs.calls, strict=True)
    ]
    unread = recorder.refusals.why | unread_in_graphs(hooks, graphs)
    calls = {name: dict(counts.lost + recorder.lost_of(name)) for name, counts, _ in rows}
    silent = _silent_forwards(hooks, graphs)
    if silent and not hooks.silence_told:
        hooks.silence_told = True
        warn_of_silent_forwards(silent)
    return Lost(
        samples_without_range=sum(lost.samples_without_range for lost in traces),
        ranges_without_sample=sum(lost.ranges_without_sample for lost in traces),
        **summed(traces, "without_range", "unplaced", "untimed"),
        silent_forwards=silent,
        overwritten=recorder.overwritten + graphs.overwritten,
        unreduced=recorder.unreduced,
        padding_unknown=hooks.watch.padding_unknown + hooks.calls.padding_unclear,
        misread=unread | {name: counts.misread for name, counts, _ in rows if counts.misread is not None},
        never_called=tuple(
            name for name, counts, in_graphs in rows if counts.seen == in_graphs == 0 and name not in unread
        ),
        calls_seen={name: counts.seen for name, counts, _ in rows if counts.seen},
        calls={name: lost for name, lost in calls.items() if lost},
        not_reached=dict(hooks.watch.missing.forwards),
        experts_without_router=hooks.calls.orphans,
        hook_failure=hooks.watch.failures.first,
    )

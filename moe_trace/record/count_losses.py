"""What a recording lacks, and what only its calls could tell of the routers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from moe_trace.data.schema import Lost, RouterInfo
from moe_trace.record.calls.recorder import Recorder
from moe_trace.record.hooks.model import ModelHooks

_FUSED_NOTE = (
    "its block ran fused, without calling router or experts: the decision was computed again from the "
    "block's input and the router's weights, and the router has no latency of its own"
)


def router_infos(hooks: ModelHooks) -> tuple[RouterInfo, ...]:
    """What is known of each router, with what only its calls could tell."""
    infos = [router.site.info for router in hooks.routers]
    return tuple(
        replace(info, notes=(*info.notes, _FUSED_NOTE)) if counts.fused else info
        for info, counts in zip(infos, hooks.calls.counts, strict=True)
    )


def losses(
    hooks: ModelHooks,
    recorder: Recorder,
    traces: Sequence[Lost],
    *,
    silent_forwards: int,
    overwritten: int,
    in_graphs: Sequence[int],
) -> Lost:
    """All that is not in the recording.

    Args:
        traces: what merging into traces lost.
        silent_forwards: see `Lost`.
        overwritten: calls inside graphs that were.
        in_graphs: recorded calls inside graphs, by router.
    """
    rows = [
        (router.site.name, counts, graphs)
        for router, counts, graphs in zip(hooks.routers, hooks.calls.counts, in_graphs, strict=True)
    ]
    calls = {name: dict(counts.lost + recorder.lost_of(name)) for name, counts, _ in rows}
    return Lost(
        samples_without_range=sum(lost.samples_without_range for lost in traces),
        ranges_without_sample=sum(lost.ranges_without_sample for lost in traces),
        without_range=dict(sum((Counter(lost.without_range) for lost in traces), Counter())),
        unplaced=dict(sum((Counter(lost.unplaced) for lost in traces), Counter())),
        untimed=dict(sum((Counter(lost.untimed) for lost in traces), Counter())),
        silent_forwards=silent_forwards,
        overwritten=recorder.overwritten + overwritten,
        unreduced=recorder.unreduced,
        padding_unknown=hooks.watch.padding_unknown + hooks.calls.padding_unclear,
        misread={name: counts.misread for name, counts, _ in rows if counts.misread is not None},
        never_called=tuple(name for name, counts, graphs in rows if counts.seen == 0 and graphs == 0),
        calls_seen={name: counts.seen for name, counts, _ in rows if counts.seen},
        calls={name: lost for name, lost in calls.items() if lost},
        not_reached=dict(hooks.watch.missing.forwards),
        experts_without_router=hooks.calls.orphans,
        hook_failure=hooks.watch.failures.first,
    )

"""What each view shows, as data: functions from a request's parameters to plain JSON. No HTTP in here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from moe_trace.data.errors import MoETraceError
from moe_trace.data.loads import describe_load
from moe_trace.read.diff import compare
from moe_trace.read.time.lanes import Clock, Lanes, Pieces, add_up, find_lanes, join_pieces
from moe_trace.show.figures.figure import TABLE_ROWS_MAX
from moe_trace.show.figures.load import expert_heat_map
from moe_trace.show.figures.routing import difference_map, layer_figures, layer_summary
from moe_trace.show.figures.time import time_figures
from moe_trace.show.figures.timeline import timeline_figure
from moe_trace.show.tensorboard.catalog import FRESH_S, Catalogs, Trace
from moe_trace.show.tensorboard.definitions import DEFINITIONS
from moe_trace.show.tensorboard.overview import overview
from moe_trace.show.tensorboard.parameters import Parameters, integer, step_range, time_window
from moe_trace.show.tensorboard.plain import Plain, figures_by_key, plain_figure, plain_table
from moe_trace.show.tensorboard.ranks import rank_digest, ranks, run_report, together
from moe_trace.show.tensorboard.routing import (
    StepCounts,
    equal_share_row,
    layer_facts,
    loaded_routers,
    step_label,
)
from moe_trace.show.tensorboard.store import Store

KERNELS_MAX = 100
NAME_MAX = 400
PIXELS = 1500
"""Stretches of the timeline are told apart down to this part of the window."""


class Dashboard:
    """Answers the views' questions."""

    def __init__(self, catalogs: Catalogs) -> None:
        self.catalogs = catalogs
        self.store = Store(Path(catalogs.logdir or "."))
        self._views: dict[str, Callable[[Parameters], Plain]] = {
            "runs": self.runs_impl,
            "trace": self.trace_impl,
            "overview": self.overview_impl,
            "routing": self.routing_impl,
            "heat": self.heat_impl,
            "layer": self.layer_impl,
            "time": self.time_impl,
            "timeline": self.timeline_impl,
            "kernels": self.kernels_impl,
            "compare": self.compare_impl,
            "ranks": self.ranks_impl,
        }

    def answer(self, view: str, parameters: Parameters) -> Plain:
        """The data of a view; a trace that cannot be read is an answer too: `{"broken": reason}`.

        Raises:
            KeyError: no such run, trace, layer or step.
            ValueError: a parameter has another form.
        """
        try:
            return self._views[view](parameters)
        except MoETraceError as error:
            return {"broken": str(error)}

    # -- which traces ---------------------------------------------------------------------------------

    def runs_impl(self, parameters: Parameters) -> Plain:
        """All runs and their traces, with what is known of each."""
        catalog = self.catalogs.get(0.0 if parameters.get("fresh") else FRESH_S)
        self.store.forget_old(catalog)
        runs: dict[str, list[Plain]] = {}
        for trace in catalog.traces.values():
            runs.setdefault(trace.run, []).append(self._listed(trace))
        for (run, name), reason in catalog.refused.items():
            runs.setdefault(run, []).append(
                {"trace": name, "label": name, "state": "broken", "reason": reason}
            )
        return {
            "logdir": self.catalogs.logdir,
            "runs": [{"run": run, "traces": traces} for run, traces in sorted(runs.items())],
            "cut_off": catalog.cut_off,
            "definitions": DEFINITIONS,
        }

    def trace_impl(self, parameters: Parameters) -> Plain:
        """One trace, read if need be, so that the list can say what it is."""
        trace = self._trace(parameters)
        with suppress(MoETraceError):  # its reason is in the answer
            self.store.summary(trace)
        return self._listed(trace)

    def _listed(self, trace: Trace) -> Plain:
        found: Plain = {
            "trace": trace.name,
            "label": trace.label,
            "size_bytes": trace.size_bytes,
            "version": f"{trace.mtime_ns}-{trace.size_bytes}",
        }
        summary, reason = self.store.known(trace), self.store.reason(trace)
        if summary is not None:
            return {**found, "state": "ok", "rank": summary.rank}
        return {**found, "state": "broken", "reason": reason} if reason else {**found, "state": "unread"}

    def _trace(self, parameters: Parameters, suffix: str = "") -> Trace:
        return self.catalogs.find(parameters.get("run" + suffix, ""), parameters.get("trace" + suffix, ""))

    # -- views ----------------------------------------------------------------------------------------

    def overview_impl(self, parameters: Parameters) -> Plain:
        """Facts, cards and findings."""
        return overview(self.store.summary(self._trace(parameters)))

    def routing_impl(self, parameters: Parameters) -> Plain:
        """The heat map over all steps, and which steps and layers there are."""
        trace = self._trace(parameters)
        summary = self.store.summary(trace)
        figure = self.store.derived(trace, "map", lambda s: replace(expert_heat_map(s), frames=[]))
        routers = loaded_routers(summary)
        return {
            "steps": self.store.derived(trace, "steps", StepCounts).steps.tolist(),
            "sites": [router.info.site for router in routers],
            "worst": worst.info.site if (worst := summary.which_layer_is_most_uneven()) is not None else None,
            "map": plain_figure(figure) if figure.data else None,
        }

    def heat_impl(self, parameters: Parameters) -> Plain:
        """The heat map's numbers and its table, of some steps."""
        trace = self._trace(parameters)
        counts = self.store.derived(trace, "steps", StepCounts)
        chosen = counts.between(*step_range(parameters, counts.steps))
        routers = loaded_routers(self.store.summary(trace))
        rows = []
        for router, load_E in zip(routers, chosen, strict=True):
            load = describe_load(load_E)
            busiest = int(load_E.argmax()) if load_E.any() else None
            cells = (load.max_over_mean, load.cv, load.gini, load.entropy, busiest, len(load.dead_experts))
            rows.append((router.info.site, int(load_E.sum()), *cells))
        headings = (
            "layer",
            "assignments",
            "max÷mean",
            "CV",
            "Gini",
            "entropy",
            "busiest expert",
            "dead experts",
        )
        return {
            "z": [equal_share_row(row, counts.width) for row in chosen],
            "table": plain_table(headings, rows),
        }

    def layer_impl(self, parameters: Parameters) -> Plain:
        """One layer: its load sorted and over time, its decisions, its lost slots."""
        trace = self._trace(parameters)
        summary = self.store.summary(trace)
        routers = loaded_routers(summary)
        index = next((i for i, r in enumerate(routers) if r.info.site == parameters.get("site")), None)
        if index is None:
            raise KeyError("layer of that name")
        router = routers[index]
        counts = self.store.derived(trace, "steps", StepCounts)
        first, last = step_range(parameters, counts.steps)
        one = self.store.derived(
            trace, ("layer", router.info.name), lambda summary: layer_summary(summary, router)
        )
        label = (
            "all steps"
            if (first, last) == (0, len(counts.steps) - 1)
            else step_label(counts.steps, first, last)
        )
        found = layer_figures(one, counts.between(first, last)[index], label)
        place = summary.routers.index(router)
        return {
            "site": router.info.site,
            "facts": layer_facts(router, place),
            "figures": figures_by_key(found),
        }

    def time_impl(self, parameters: Parameters) -> Plain:
        """Phases by both clocks, gaps, latencies."""
        summary = self.store.summary(self._trace(parameters))
        return {"figures": figures_by_key(time_figures(summary)), "has_phases": summary.phases is not None}

    def timeline_impl(self, parameters: Parameters) -> Plain:
        """One step's lanes and counters, within a window."""
        lanes, steps, step, clock = self._lanes(parameters)
        if step is None:
            return {"steps": [], "figure": None}
        pieces = lanes.of_step(step, clock)
        origin, end = int(pieces.start_ns.min()), int(pieces.end_ns.max())
        window = time_window(parameters, origin, end)
        segments = join_pieces(pieces.within(*window), (window[1] - window[0]) // PIXELS)
        figure = timeline_figure(lanes, segments, step=step, clock=clock, origin_ns=origin, window_ns=window)
        return {
            "steps": steps,
            "step": step,
            "clock": clock,
            "clocks": list(lanes.clocks()),
            "length_us": (end - origin) / 1000,
            "figure": plain_figure(figure) if figure.data else None,
        }

    def kernels_impl(self, parameters: Parameters) -> Plain:
        """What ran in a window of one step, by name."""
        lanes, _, step, clock = self._lanes(parameters)
        if step is None:
            return {"table": None}
        pieces = lanes.of_step(step, clock)
        pieces = pieces.within(*time_window(parameters, int(pieces.start_ns.min()), int(pieces.end_ns.max())))
        work = add_up(pieces, lanes)
        total = sum(w.total_us for w in work)
        rows = [
            (
                w.name[:NAME_MAX],
                w.phase,
                w.layers,
                w.count,
                w.total_us,
                w.total_us / w.count,
                w.total_us / total,
            )
            for w in work[:KERNELS_MAX]
            if total
        ]
        what = "kernel" if clock == "device" else "operator"
        headings = (what, "phase", "layers", "count", "total µs", "mean µs", "share")
        table = {**plain_table(headings, rows), "more": max(0, len(work) - min(KERNELS_MAX, TABLE_ROWS_MAX))}
        return {"table": table, "total_us": total, "count": len(pieces.block), "what": what}

    def compare_impl(self, parameters: Parameters) -> Plain:
        """B against A: difference map, and every metric with its interval."""
        trace_a, trace_b = self._trace(parameters), self._trace(parameters, "_b")
        a, b = self.store.summary(trace_a), self.store.summary(trace_b)
        names_b = {router.info.name for router in b.routers}
        sites = ["all", *(r.info.site for r in a.routers if r.info.name in names_b)]
        site = parameters.get("site") if parameters.get("site") in sites else "all"
        changes = self.store.derived(
            trace_a, ("changes", trace_b.key, site), lambda _: compare(a, b, only=site).changes
        )
        rows = [(c.metric, c.a, c.b, c.difference, c.relative, c.low, c.high, c.verdict) for c in changes]
        figure = difference_map(a, b)
        headings = ("metric", "A", "B", "B − A", "relative", "interval from", "interval to", "verdict")
        return {
            "sites": sites,
            "site": site,
            "map": plain_figure(figure) if figure.data else None,
            "table": plain_table(headings, rows),
            "changed": sum(c.verdict == "changed" for c in changes),
            "few_calls": any(c.verdict == "few calls" for c in changes),
            "metrics": len(changes),
        }

    def ranks_impl(self, parameters: Parameters) -> Plain:
        """The ranks of a run; traces that cannot be read are named."""
        run = parameters.get("run", "")
        traces = [t for t in self.catalogs.get(FRESH_S).traces.values() if t.run == run]
        summaries, broken = [], []
        for trace in traces:
            try:
                summaries.append(self.store.summary(trace))
            except MoETraceError as error:
                broken.append({"trace": trace.name, "reason": str(error)})
        report = run_report(summaries)
        found = ranks([rank_digest(summary) for summary in summaries if summary.ranks is None], report)
        found["ranks"] = max(found["ranks"], len(report.ranks) if report is not None else 0)
        return {**found, "together": together(report), "traces": len(traces), "unreadable": broken}

    # -- one step -------------------------------------------------------------------------------------

    def _lanes(self, parameters: Parameters) -> tuple[Lanes, list[int], int | None, Clock]:
        trace = self._trace(parameters)
        summary = self.store.summary(trace)
        lanes = self.store.derived(
            trace, "lanes", lambda _: find_lanes(summary.samples, self.store.read_events(trace))
        )
        clocks = lanes.clocks()
        clock: Clock = "host" if parameters.get("clock") == "host" else clocks[0]
        pieces: Pieces = lanes.device if clock == "device" else lanes.host
        steps = sorted({lanes.samples[b].step for b in np.unique(pieces.block).tolist()})
        if not steps:
            return lanes, steps, None, clock
        step = integer(parameters, "step", steps[0])
        return lanes, steps, step if step in steps else steps[0], clock

"""Data of each view: functions from a request's parameters to plain JSON, independent of HTTP."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple, TypeVar

from moe_trace.data.display.columns import DEFINITIONS
from moe_trace.data.errors import MoETraceError
from moe_trace.data.schema import Stage
from moe_trace.data.summary import model_name
from moe_trace.read.analysis import TraceSummary
from moe_trace.read.diff import compare
from moe_trace.read.time.step_timeline import Lanes, find_lanes
from moe_trace.show.figures.decisions import entropy_over_time, layer_figures, load_over_time
from moe_trace.show.figures.expert_heat_map import (
    difference_map,
    expert_heat_map,
    physical_figure,
    step_label,
)
from moe_trace.show.figures.time import time_figures
from moe_trace.show.tensorboard.catalog import FRESH_S, Catalogs, Trace
from moe_trace.show.tensorboard.comparison import compared_sites, comparison
from moe_trace.show.tensorboard.overview import in_graphs, overview, path_of
from moe_trace.show.tensorboard.parameters import Parameters, step_range
from moe_trace.show.tensorboard.ranks import ranks, run_report, together
from moe_trace.show.tensorboard.routes import RoutesFiles, routes_file
from moe_trace.show.tensorboard.routing import StepCounts, heat, layer_facts, loaded_routers
from moe_trace.show.tensorboard.store import Store
from moe_trace.show.tensorboard.timeline import kernels, timeline
from moe_trace.show.tensorboard.to_json import JsonDict, figures_by_key, plain_figure

_T = TypeVar("_T")


class StagePart(NamedTuple):
    """The part of a trace that a view shows: one stage, if the trace has several."""

    trace: Trace
    stage: Stage | None
    summary: TraceSummary


class Dashboard:
    """Handler of the views' requests."""

    def __init__(self, catalogs: Catalogs) -> None:
        self.catalogs = catalogs
        self.store = Store()
        self._routes = RoutesFiles()
        self._views: dict[str, Callable[[Parameters], JsonDict]] = {
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
            "routes": lambda p: self._routes.header(self._trace(p), p),
            "routes_page": lambda p: self._routes.page(self._trace(p), p),
            "routes_study": lambda p: self._routes.study(self._trace(p), self._run(p), p),
        }

    def answer(self, view: str, parameters: Parameters) -> JsonDict:
        """Return the data of a view, or `{"broken": reason}` for a trace that cannot be read.

        Raises:
            KeyError: there is no such run, trace, layer or step.
            ValueError: a parameter is malformed.
        """
        try:
            return self._views[view](parameters)
        except MoETraceError as error:
            return {"broken": str(error)}

    # -- which traces ---------------------------------------------------------------------------------

    def runs_impl(self, parameters: Parameters) -> JsonDict:
        """List all runs and their traces, with what is already known of each."""
        catalog = self.catalogs.get(0.0 if parameters.get("fresh") else FRESH_S)
        self.store.forget_old(catalog)
        runs: dict[str, list[JsonDict]] = {}
        for trace in catalog.traces.values():
            runs.setdefault(trace.run, []).append(self._trace_entry(trace))
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

    def trace_impl(self, parameters: Parameters) -> JsonDict:
        """Read one trace if necessary and return its entry of the list."""
        trace = self._trace(parameters)
        with suppress(MoETraceError):  # the answer contains the reason
            self.store.summary(trace)
        return self._trace_entry(trace)

    def _trace_entry(self, trace: Trace) -> JsonDict:
        found: JsonDict = {
            "trace": trace.name,
            "label": trace.label,
            "size_bytes": trace.size_bytes,
            "version": f"{trace.mtime_ns}-{trace.size_bytes}",
            "routes": routes_file(trace) is not None,
        }
        summary, reason = self.store.known(trace), self.store.reason(trace)
        if summary is not None:
            ranks = len(summary.ranks.ranks) if summary.ranks is not None else 1
            model = model_name(summary.model)
            model += f", {len(summary.routers)} routers"  # models of one class may differ in length
            known = {"rank": summary.rank, "ranks": ranks, "stages": list(summary.by_stage()), "model": model}
            return {**found, "state": "ok", **known}
        return {**found, "state": "broken", "reason": reason} if reason else {**found, "state": "unread"}

    def _trace(self, parameters: Parameters, suffix: str = "") -> Trace:
        return self.catalogs.find(parameters.get("run" + suffix, ""), parameters.get("trace" + suffix, ""))

    def _run(self, parameters: Parameters) -> list[Trace]:
        run = parameters.get("run", "")
        return [trace for trace in self.catalogs.get(FRESH_S).traces.values() if trace.run == run]

    def _part(self, parameters: Parameters, suffix: str = "") -> StagePart:
        """Return a trace and its requested stage, or else A's stage, or else the first."""
        trace = self._trace(parameters, suffix)
        whole = self.store.summary(trace)
        if not whole.stages:
            return StagePart(trace, None, whole)
        stages_asked = [parameters.get(name) for name in ("stage" + suffix, "stage")]
        stage = min(
            whole.stages, key=lambda s: stages_asked.index(s) if s in stages_asked else len(stages_asked)
        )
        return StagePart(trace, stage, whole.stages[stage])

    def _derived(self, part: StagePart, what: Hashable, compute: Callable[[TraceSummary], _T]) -> _T:
        return self.store.derived(part.trace, (part.stage, what), lambda _: compute(part.summary))

    # -- views ----------------------------------------------------------------------------------------

    def overview_impl(self, parameters: Parameters) -> JsonDict:
        """Return facts, cards and findings."""
        return overview(self.store.summary(self._trace(parameters)))

    def routing_impl(self, parameters: Parameters) -> JsonDict:
        """Return the heat map over all steps, and lists of the steps and layers."""
        part = self._part(parameters)
        figure = self._derived(part, "map", lambda s: replace(expert_heat_map(s), frames=[]))
        over_time = self._derived(
            part, "over time", lambda s: [load_over_time(s.calls), entropy_over_time(s.calls)]
        )
        physical = self._derived(part, "physical", lambda s: physical_figure(s.physical))
        routers = loaded_routers(part.summary)
        worst = part.summary.most_imbalanced_layer()
        return {
            "steps": self._derived(part, "steps", StepCounts).steps.tolist(),
            "sites": [router.info.site for router in routers],
            "worst": worst.info.site if worst is not None else None,
            "map": plain_figure(figure) if figure.data else None,
            "over_time": figures_by_key(
                [*([physical] if physical.data else []), *(over_time if len(routers) > 1 else [])]
            ),
        }

    def heat_impl(self, parameters: Parameters) -> JsonDict:
        """Return the heat map's numbers and its table for a range of steps."""
        part = self._part(parameters)
        counts = self._derived(part, "steps", StepCounts)
        return heat(loaded_routers(part.summary), counts, *step_range(parameters, counts.steps))

    def layer_impl(self, parameters: Parameters) -> JsonDict:
        """Return one layer's load, sorted and over time, its decisions and its lost slots."""
        part = self._part(parameters)
        routers = loaded_routers(part.summary)
        index = next((i for i, r in enumerate(routers) if r.info.site == parameters.get("site")), None)
        if index is None:
            raise KeyError("layer of that name")
        router = routers[index]
        counts = self._derived(part, "steps", StepCounts)
        first, last = step_range(parameters, counts.steps)
        label = (
            "all steps"
            if (first, last) == (0, len(counts.steps) - 1)
            else step_label(int(counts.steps[first]), int(counts.steps[last]))
        )
        calls = part.summary.calls.take(part.summary.calls.of_router(router.info.name))
        found = layer_figures(router, calls, counts.between(first, last)[index], label)
        place = f"{path_of(part.stage)}routers.{part.summary.routers.index(router)}"
        return {
            "site": router.info.site,
            "facts": layer_facts(router, place),
            "figures": figures_by_key(found),
        }

    def time_impl(self, parameters: Parameters) -> JsonDict:
        """Return phases by both clocks, gaps, and latencies."""
        summary = self._part(parameters).summary
        return {
            "figures": figures_by_key(time_figures(summary)),
            "has_phases": summary.phases is not None,
            "in_graphs": in_graphs(summary),
        }

    def timeline_impl(self, parameters: Parameters) -> JsonDict:
        """Return one step's lanes and counters within a window."""
        found = timeline(self._lanes(parameters), parameters)
        if found["figure"] is None:
            found["in_graphs"] = in_graphs(self._part(parameters).summary)
        return found

    def kernels_impl(self, parameters: Parameters) -> JsonDict:
        """Return the kernels or operators in a window of one step, by name."""
        return kernels(self._lanes(parameters), parameters)

    def _lanes(self, parameters: Parameters) -> Lanes:
        part = self._part(parameters)

        def lanes(summary: TraceSummary) -> Lanes:
            trace = self.store.read_file(part.trace)
            return find_lanes(summary.samples, trace.events, trace.recording.compiled_graphs)

        return self._derived(part, "lanes", lanes)

    def compare_impl(self, parameters: Parameters) -> JsonDict:
        """Compare B with A: difference map, and every metric with its interval."""
        a, b = self._part(parameters), self._part(parameters, "_b")
        sites = compared_sites(a.summary, b.summary)
        site = parameters.get("site", "") if parameters.get("site") in sites else "all"
        what = ("changes", b.trace.key, b.stage, site)
        found = self._derived(a, what, lambda summary: compare(summary, b.summary, only=site))
        return {"sites": sites, "site": site, **comparison(found, difference_map(a.summary, b.summary))}

    def ranks_impl(self, parameters: Parameters) -> JsonDict:
        """Return the ranks of a run; traces that cannot be read are listed."""
        traces = self._run(parameters)
        summaries, broken = [], []
        for trace in traces:
            try:
                summaries.append(self.store.summary(trace))
            except MoETraceError as error:
                broken.append({"trace": trace.name, "reason": str(error)})
        report = run_report(summaries)
        found = ranks([summary for summary in summaries if summary.ranks is None], report)
        found["ranks"] = max(found["ranks"], len(report.ranks) if report is not None else 0)
        return {**found, "together": together(report), "traces": len(traces), "unreadable": broken}

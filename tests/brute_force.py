"""Brute-force reading of a trace: plain `json`, every pair of events, no code of moe_trace.

This computes event by event, in whole nanoseconds, what the package computes from columns.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from spliced import recording_in

PHASES = ("router", "dispatch", "experts", "combine", "shared", "other")
PRODUCTS = {"aten::" + n for n in ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_grouped_mm")}
GATHERS = {"aten::index", "aten::index_select", "aten::gather"}
WRITES = {
    "aten::index_add_",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::scatter_add_",
    "aten::scatter_",
}
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
HOST = ("cpu_op", "cuda_runtime", "cuda_driver")


def load(path: Path) -> Any:
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)


def ns(time_us: float) -> int:
    return round(time_us * 1000)


class Slice:
    """A complete event in nanoseconds."""

    def __init__(self, event: dict[str, Any]) -> None:
        self.name = event["name"]
        self.cat = event.get("cat")
        self.thread = (event["pid"], event["tid"])
        self.start = ns(event["ts"])
        self.end = self.start + ns(event.get("dur", 0))
        self.args = event.get("args") or {}

    @property
    def duration(self) -> int:
        return self.end - self.start

    def holds(self, other: Slice) -> bool:
        return self.thread == other.thread and self.start <= other.start and other.end <= self.end


class Brute:
    """One trace, ready to be asked."""

    def __init__(self, path: Path) -> None:
        self.trace = load(path)
        events = self.trace["traceEvents"]
        self.slices = [Slice(e) for e in events if e.get("ph") == "X" and e.get("cat") != "moe_trace"]
        self.kernels: dict[int, list[Slice]] = defaultdict(list)
        for s in self.slices:
            if s.cat in DEVICE:
                self.kernels[s.args["correlation"]].append(s)
        self.flows: dict[Any, dict[str, Any]] = defaultdict(dict)
        for e in events:
            if e.get("cat") == "fwdbwd":
                self.flows[e["id"]][e["ph"]] = (ns(e["ts"]), (e["pid"], e["tid"]))

    def calls(self) -> list[dict[str, Any]]:
        """One entry per sample, in the file's order, with its ranges found by enclosure of the clock."""
        found = []
        recording = recording_in(self.trace)
        columns = recording["samples"]
        for i, router in enumerate(columns["router"]):
            info = recording["routers"][router]
            clock = columns["host_start_ns"][i] - self.trace.get("baseTimeNanoseconds", 0)
            router_range = self.range_at("moe.router/" + info["site"], clock)
            block = self.range_round("moe.block/" + info["site"], router_range)
            experts = next(
                s
                for s in self.slices
                if s.cat == "user_annotation" and s.name == "moe.experts/" + info["site"] and block.holds(s)
            )
            found.append(
                {
                    "name": info["name"],
                    "site": info["site"],
                    "call": columns["call"][i],
                    "router": router_range,
                    "block": block,
                    "experts": experts,
                }
            )
        return found

    def range_at(self, name: str, time: int) -> Slice:
        [only] = [
            s
            for s in self.slices
            if s.cat == "user_annotation" and s.name == name and s.start <= time <= s.end
        ]
        return only

    def range_round(self, name: str, inner: Slice) -> Slice:
        [only] = [s for s in self.slices if s.cat == "user_annotation" and s.name == name and s.holds(inner)]
        return only

    def launched_in(self, outer: Slice) -> list[Slice]:
        """Kernels, copies and memsets of the launches that start inside a slice of the host."""
        return [
            kernel
            for s in self.slices
            if s.cat in ("cuda_runtime", "cuda_driver")
            and s.thread == outer.thread
            and outer.start <= s.start <= outer.end
            for kernel in self.kernels.get(s.args.get("correlation"), [])
        ]

    def device_span(self, host: Slice) -> int | None:
        """By the `gpu_user_annotation` of the same External id."""
        twins = [
            s
            for s in self.slices
            if s.cat == "gpu_user_annotation" and s.args["External id"] == host.args["External id"]
        ]
        if not twins:
            return None
        return max(t.end for t in twins) - min(t.start for t in twins)

    # -- phases -----------------------------------------------------------------------------------------

    def steps(self, call: dict[str, Any]) -> list[tuple[Slice, str]]:
        """The outermost operators and launches of the block, each with its phase."""
        inside = [s for s in self.slices if s.cat in HOST and call["block"].holds(s)]
        inside.sort(key=lambda s: (s.start, -s.end))
        outer = [
            s for i, s in enumerate(inside) if not any(o.holds(s) for j, o in enumerate(inside) if j < i)
        ]
        within = {id(o): [s for s in inside if o.holds(s)] for o in outer}

        def has(step: Slice, names: set[str]) -> bool:
            return any(s.name in names for s in within[id(step)])

        router, experts = call["router"], call["experts"]
        parts: dict[str, list[Slice]] = defaultdict(list)
        for step in outer:
            if router.start <= step.start < router.end:
                parts["router"].append(step)
            elif experts.start <= step.start < experts.end:
                parts["experts"].append(step)
            elif step.start < router.start:
                parts["before"].append(step)
            elif step.start < experts.start:
                parts["between"].append(step)
            else:
                parts["after"].append(step)
        named = [(s, "router") for s in parts["router"]]
        named += self.experts_steps(parts["experts"], has)
        for part in ("before", "between", "after"):
            named += outside_steps(parts[part], has)
        return named

    def experts_steps(self, steps: list[Slice], has: Any) -> list[tuple[Slice, str]]:
        products = [i for i, s in enumerate(steps) if has(s, PRODUCTS)]
        if not products:
            return [(s, "experts") for s in steps]
        named = [(s, "dispatch") for s in steps[: products[0]]]
        for here, following in zip(products, [*products[1:], None], strict=True):
            named.append((steps[here], "experts"))
            if following is None:
                named += [(s, "combine") for s in steps[here + 1 :]]
                break
            between = steps[here + 1 : following]
            writes = [i for i, s in enumerate(between) if has(s, WRITES)]
            for i, s in enumerate(between):
                if writes:
                    named.append((s, "combine" if i <= writes[-1] else "dispatch"))
                else:
                    named.append((s, "dispatch" if s.name in GATHERS else "experts"))
        return named

    def times(self, call: dict[str, Any]) -> dict[str, Any]:
        """Everything the phases of one call add up to."""
        steps = self.steps(call)
        host = dict.fromkeys(PHASES, 0)
        of_phase: dict[str, list[Slice]] = {phase: [] for phase in PHASES}
        for step, phase in steps:
            host[phase] += step.duration
        block = call["block"]
        for kernel, launch in self.kernels_with_launch():
            if launch.thread != block.thread or not block.start <= launch.start <= block.end:
                continue
            for step, phase in steps:
                if step.holds(launch):
                    of_phase[phase].append(kernel)
        everything = [k for kernels in of_phase.values() for k in kernels]
        return {
            "host": host,
            "busy": {p: sum(k.duration for k in ks) for p, ks in of_phase.items()},
            "kernels": {p: len(ks) for p, ks in of_phase.items()},
            "span": {p: hull(ks) for p, ks in of_phase.items()},
            "device_span": hull(everything),
            "device_gap": hull(everything) - covered(everything),
            "backward": self.backward(steps),
        }

    @functools.cache  # noqa: B019 - one trace a test
    def recomputed_blocks(self) -> list[Slice]:
        """Blocks on a thread that also runs backward nodes, after the first of them: what ran again."""
        nodes = [flow["f"] for flow in self.flows.values() if set(flow) == {"s", "f"}]
        first: dict[Any, int] = {}
        for time, thread in nodes:
            first[thread] = min(time, first.get(thread, time))
        return [
            s
            for s in self.slices
            if s.cat == "user_annotation"
            and s.name.startswith("moe.block/")
            and s.start >= first.get(s.thread, s.start + 1)
        ]

    @functools.cache  # noqa: B019
    def kernels_with_launch(self) -> list[tuple[Slice, Slice]]:
        return [
            (kernel, s)
            for s in self.slices
            if s.cat in ("cuda_runtime", "cuda_driver")
            for kernel in self.kernels.get(s.args.get("correlation"), [])
        ]

    def backward(self, steps: list[tuple[Slice, str]]) -> dict[str, dict[str, int]]:
        host, busy = dict.fromkeys(PHASES, 0), dict.fromkeys(PHASES, 0)
        for flow in self.flows.values():
            if set(flow) != {"s", "f"}:
                continue
            time, thread = flow["s"]
            phases = [p for s, p in steps if s.thread == thread and s.start <= time <= s.end]
            if not phases:
                continue
            time, thread = flow["f"]
            nodes = [s for s in self.slices if s.cat == "cpu_op" and s.thread == thread and s.start == time]
            node = max(nodes, key=lambda s: s.duration)
            # Checkpointing runs the forward again inside the first node that needs it, before its own work.
            again = [b.end for b in self.recomputed_blocks() if node.holds(b)]
            begin = max([node.start, *again])
            host[phases[0]] += node.end - begin
            busy[phases[0]] += sum(
                kernel.duration
                for kernel, launch in self.kernels_with_launch()
                if launch.thread == node.thread and begin <= launch.start <= node.end
            )
        return {"host": host, "busy": busy}


def outside_steps(steps: list[Slice], has: Any) -> list[tuple[Slice, str]]:
    products = [i for i, s in enumerate(steps) if has(s, PRODUCTS)]
    if not products:
        return [(s, "other") for s in steps]
    return [(s, "shared" if products[0] <= i <= products[-1] else "other") for i, s in enumerate(steps)]


def hull(slices: list[Slice]) -> int:
    return max(s.end for s in slices) - min(s.start for s in slices) if slices else 0


def covered(slices: list[Slice]) -> int:
    """Time in which at least one of the slices runs."""
    edges = sorted({t for s in slices for t in (s.start, s.end)})
    return sum(
        end - start
        for start, end in itertools.pairwise(edges)
        if any(s.start <= start and end <= s.end for s in slices)
    )

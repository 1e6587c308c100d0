"""Calls inside graphs on the timeline: real traces by brute force, hand-made ones in round numbers."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import graph_trace as made
from moe_trace.data.codec import decode_recording, encode_recording
from moe_trace.data.schema import Lost, Placement, Recording, Span
from moe_trace.data.trace_json.windows import EventBytes
from moe_trace.read.check import check, read_checked
from moe_trace.read.file.trace_file import read_trace
from moe_trace.read.reader import read_summary
from moe_trace.timeline.correlate import reasons
from moe_trace.timeline.correlate.launches import read_launches
from moe_trace.timeline.merge import Merged, merge_recording
from moe_trace.timeline.placed_calls import REPLAY_FIGURES
from paths import DATA
from spliced import without_additions


def broken_rules(path: Path) -> set[str]:
    return {rule for rule, broken in check(read_checked(path)).items() if broken}


H200 = DATA / "h200_graphs"


def merged(tmp_path: Path, events: Sequence[Any], recording: Recording) -> Merged:
    """Merge, and see that the file keeps every promise."""
    path = made.write_trace(tmp_path / "trace.json", events)
    outcome = merge_recording(path, [recording])
    assert broken_rules(path) == ({"kernels_have_launches"} if _kernels_without_launch(events) else set())
    return outcome


def _kernels_without_launch(events: Sequence[Any]) -> bool:
    """Whether some kernel is the work of no call that the trace holds."""
    launched = {e["args"].get("correlation") for e in events if e["cat"] in ("cuda_runtime", "cuda_driver")}
    return any(e["cat"] == "kernel" and e["args"].get("correlation") not in launched for e in events)


def placements(outcome: Merged) -> list[Placement | None]:
    return [sample.placement for sample in outcome.placed[0]]


def band(path: Path, name: str) -> list[Any]:
    pids = [e["pid"] for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "process_labels"]
    events = json.loads(path.read_text())["traceEvents"]
    return [e for e in events if e["pid"] in pids[-1:] and e["name"] == name and e["ph"] != "M"]


# -- real traces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compiled_model", "compiled_layers"])
def test_real_replays_are_placed_as_brute_force_places_them(name: str, tmp_path: Path) -> None:
    """One launch in a forward: that launch and its kernels. Two: the forward, from first kernel to last."""
    source = H200 / f"{name}.pt.trace.json.gz"
    path = tmp_path / source.name
    path.write_bytes(source.read_bytes())
    recording = read_trace(path).recording
    outcome = merge_recording(path, [recording])
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    base_ns = json.loads(gzip.decompress(path.read_bytes()))["baseTimeNanoseconds"]
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("moe.graph/")]
    assert len(outcome.placed[0]) == 6 and len(ranges) == 3
    for sample in outcome.placed[0]:
        time_us = (sample.host_start_ns - base_ns) / 1000
        (own,) = [e for e in ranges if e["ts"] <= time_us <= e["ts"] + e["dur"]]
        launches = [
            e
            for e in events
            if e["name"] == "cudaGraphLaunch" and own["ts"] <= e["ts"] <= own["ts"] + own["dur"]
        ]
        assert len(launches) == (1 if name == "compiled_model" else 2)
        host = launches[0] if len(launches) == 1 else own
        if len(launches) == 1:
            correlation = launches[0]["args"]["correlation"]
            work = [
                e
                for e in events
                if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
                and e["args"]["correlation"] == correlation
            ]
            assert len(work) > 40
        else:
            external = own["args"]["External id"]
            work = [
                e
                for e in events
                if e.get("cat") == "gpu_user_annotation" and e["args"]["External id"] == external
            ]
        start, end = min(e["ts"] for e in work), max(e["ts"] + e["dur"] for e in work)
        assert sample.placement is not None
        assert sample.placement.host == {"graph": Span(host["ts"], host["dur"])}
        assert sample.placement.device["graph"].start_us == start
        assert sample.placement.device["graph"].end_us == pytest.approx(end, abs=2e-3)
        assert sample.placement.device.keys() == {"graph"}
    assert outcome.lost.untimed == {reasons.FUSED: 6}
    assert broken_rules(path) == set()


@pytest.mark.parametrize("name", ["compiled_model", "compiled_layers"])
def test_torchs_own_validator_passes_as_on_the_plain_trace(name: str, tmp_path: Path) -> None:
    validator = pytest.importorskip("torch.profiler._trace_validator")
    path, plain = tmp_path / "merged.json", tmp_path / "plain.json"
    path.write_bytes(gzip.decompress((H200 / f"{name}.pt.trace.json.gz").read_bytes()))
    merge_recording(path, [read_trace(path).recording])
    plain.write_bytes(without_additions(path))
    assert validator.validate_trace(str(path)) == validator.validate_trace(str(plain))


def test_real_replays_by_hand_are_timed_as_brute_force_times_them() -> None:
    path = H200 / "by_hand.pt.trace.json.gz"
    if not path.exists():
        pytest.skip("not recorded yet: python scripts/record_graph_traces.py --out tests/data/h200_graphs")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    launches = sorted((e for e in events if e["name"] == "cudaGraphLaunch"), key=lambda e: e["ts"])
    samples = read_trace(path).recording.samples
    assert len(samples) == 2 * len(launches)
    for i, sample in enumerate(sorted(samples, key=lambda s: (s.call, s.layer))):
        launch = launches[i // 2]
        work = [
            e
            for e in events
            if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
            and e["args"]["correlation"] == launch["args"]["correlation"]
        ]
        assert sample.placement is not None
        assert sample.placement.host == {"graph": Span(launch["ts"], launch["dur"])}
        router = sample.placement.device["router"]
        inside = [e for e in work if router.start_us <= e["ts"] < router.end_us]
        assert sample.placement.busy_us["router"] == pytest.approx(sum(e["dur"] for e in inside), abs=0.01)
        # The choice of the experts is the router's, and no other kernel chooses any.
        chooses = sorted((e for e in work if "TopK" in e["name"]), key=lambda e: e["ts"])
        assert len(chooses) == 2 and chooses[i % 2] in inside
    assert broken_rules(path) == set()


# -- forwards that the host saw -----------------------------------------------------------------------


def test_a_forward_with_one_launch_stands_at_the_launch(tmp_path: Path) -> None:
    events = made.forward_range(1000, 300, 5, device=(1090, 200)) + made.replay(1050, 1)
    outcome = merged(tmp_path, events, made.recording([made.seen(0, 1010), made.seen(0, 1010, layer=1)]))
    place = Placement(host={"graph": Span(1050, 10)}, device={"graph": Span(1150, 70)})
    assert placements(outcome) == [place, place]
    assert outcome.lost.untimed == {reasons.FUSED: 2}
    path = tmp_path / "trace.json"
    (slice_,) = band(path, "graph")
    assert (slice_["ts"], slice_["dur"], slice_["args"]["layers"]) == (1150, 70, 2)
    assert slice_["args"]["in graph"] is True and slice_["args"]["L01"].startswith("4 tokens, 8 assignments")
    worst = band(path, "load max÷mean (graph: worst layer)")
    assert [(e["ts"], e["args"]["value"]) for e in worst] == [(1150, 1.5), (1220, 0)]
    assert band(path, "load max÷mean") == [] and band(path, "L00") == []


@pytest.mark.parametrize("beside", ["triton", "scatter", "launch", "nothing"])
def test_a_launch_that_may_not_hold_the_call_is_not_named(tmp_path: Path, beside: str) -> None:
    """Code beside the launch may have made the decision: then only the whole forward is true."""
    extra = {
        "triton": [made.event("cuda_driver", "cuLaunchKernel", 1070, 2, correlation=9)],
        "scatter": [
            made.event("kernel", "index_put_kernel_impl<int>", 1100, 5, pid=0, tid=3, correlation=9),
        ],
        "launch": made.replay(1070, 2),
        "nothing": [made.event("cuda_runtime", "cudaLaunchKernel", 1070, 2, correlation=9)],
    }[beside]
    events = made.forward_range(1000, 300, 5, device=(1090, 250)) + made.replay(1050, 1) + extra
    outcome = merged(tmp_path, events, made.recording([made.seen(0, 1010)]))
    whole = Placement(host={"graph": Span(1000, 300)}, device={"graph": Span(1090, 250)})
    at_launch = Placement(host={"graph": Span(1050, 10)}, device={"graph": Span(1150, 70)})
    assert placements(outcome) == [at_launch if beside == "nothing" else whole]


def test_a_forward_without_a_device_stands_on_the_host(tmp_path: Path) -> None:
    events = made.forward_range(1000, 300, 5, device=None) + made.forward_range(2000, 300, 6, device=None)
    outcome = merged(tmp_path, events, made.recording([made.seen(0, 1010), made.seen(1, 2299)]))
    assert [p.host["graph"].start_us for p in placements(outcome) if p] == [1000, 2000]
    assert [p.device for p in placements(outcome) if p] == [{}, {}]


def test_a_forward_without_a_range_is_counted_with_its_reason(tmp_path: Path) -> None:
    events = made.forward_range(1000, 300, 5, device=None)
    samples = [made.seen(0, 1010), made.seen(1, 1500)]  # the second after the range
    outcome = merged(tmp_path, events, made.recording(samples))
    assert [p is None for p in placements(outcome)] == [False, True]
    assert outcome.lost.unplaced == {reasons.NO_RANGE: 1}


def test_another_thread_has_its_own_forwards(tmp_path: Path) -> None:
    other = made.event("user_annotation", "moe.graph/Tiny", 900, 500, tid=8)
    events = [*made.forward_range(1000, 300, 5, device=None), other]
    samples = [made.seen(0, 1010), replace(made.seen(1, 1011), thread=8)]
    outcome = merged(tmp_path, events, made.recording(samples))
    assert [p.host["graph"] for p in placements(outcome) if p] == [Span(1000, 300), Span(900, 500)]


def test_threads_are_told_apart_unless_the_trace_numbers_them_otherwise(tmp_path: Path) -> None:
    events = made.forward_range(1000, 300, 5, device=None)
    stranger = replace(made.seen(1, 1011), thread=8)
    outcome = merged(tmp_path, events, made.recording([made.seen(0, 1010), stranger]))
    assert outcome.lost.unplaced == {reasons.OTHER_THREAD: 1}
    outcome = merged(tmp_path, events, made.recording([stranger]))
    assert outcome.lost.unplaced == {}


def test_launches_that_straddle_the_reading_blocks_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gzip.decompress((H200 / "compiled_layers.pt.trace.json.gz").read_bytes())
    events = EventBytes(io.BytesIO(plain), 0, len(plain))
    expected = read_launches(events)
    assert [len(launch.work) for launch in expected.graphs] == [24] * 6
    for block in (70_000, 65_537, 100_003):
        monkeypatch.setattr("moe_trace.data.trace_json.windows.CHUNK", block)
        assert read_launches(events) == expected


def test_a_graphed_layer_is_told_by_its_nodes(tmp_path: Path) -> None:
    """Two launches in a forward; one of them is the captured graph that holds the router."""
    events = (
        made.forward_range(1000, 500, 5, device=(1090, 400))
        + made.replay(1050, 1, grids=(9, 9, 9, 9, 9, 9))
        + made.replay(1200, 2)
    )
    outcome = merged(
        tmp_path, events, made.recording([made.seen(0, 1010)], captured_graphs=(made.captured(),))
    )
    (place,) = placements(outcome)
    assert place is not None and place.host == {"graph": Span(1200, 10)}
    assert place.device["router"] == Span(1312, 22)


# -- forwards that only the device saw ------------------------------------------------------------------


def steps_of(*replays: int, stream: int = made.STREAM) -> list[Any]:
    """Steps of 10 000 µs with so many replays each, and a mark at the end of each; the first mark is at 0."""
    events, correlation = made.copy_of_mark(10, 9000, stream=stream), 1
    for step, count in enumerate(replays):
        for i in range(count):
            events += made.replay(10_000 * step + 1000 + 500 * i, correlation)
            correlation += 1
        events += made.copy_of_mark(10_000 * step + 9000, 9001 + step, stream=stream)
    return events


def marks_of(*forwards: int) -> tuple[Any, ...]:
    times = [10, *(10_000 * step + 9000 for step in range(len(forwards) - 1))]
    return tuple(made.mark(time, count) for time, count in zip(times, forwards, strict=True))


def test_replays_are_told_by_the_count_of_the_device(tmp_path: Path) -> None:
    """The device had counted 40 forwards when the trace began."""
    samples = [made.unseen(i, 41 + i) for i in range(4)]
    recording = made.recording(samples, graph_marks=marks_of(40, 41, 44), captured_graphs=(made.captured(),))
    outcome = merged(tmp_path, steps_of(1, 3), recording)
    launched = [1000, 11_000, 11_500, 12_000]
    assert placements(outcome) == [
        Placement(
            host={"graph": Span(t, 10)},
            device={
                "router": Span(t + 112, 22),
                "experts": Span(t + 148, 10),
                "graph": Span(t + 100, 70),
            },
            busy_us={"router": 20, "experts": 10},
        )
        for t in launched
    ]
    assert outcome.lost.untimed == {} and outcome.lost.unplaced == {}


def test_router_latency_inside_graphs_is_read_back(tmp_path: Path) -> None:
    recording = made.recording(
        [made.unseen(0, 1), made.unseen(1, 2)],
        graph_marks=marks_of(0, 1, 2),
        captured_graphs=(made.captured(),),
    )
    merged(tmp_path, steps_of(1, 1), recording)
    path = tmp_path / "trace.json"
    summary = read_summary(path)
    latency = summary.routers[0].latency
    assert latency.device_span is not None and latency.device_span.p50 == 22
    assert latency.device_busy is not None and latency.device_busy.p50 == 20
    assert latency.host is None
    router = band(path, "L00")
    assert [(e["ts"], e["dur"], e["args"]["in graph"]) for e in router] == [
        (1112, 22, True),
        (11_112, 22, True),
        (1148, 10, True),
        (11_148, 10, True),
    ]
    loads = band(path, "load max÷mean")
    assert [(e["ts"], e["args"]["value"]) for e in loads[:2]] == [(1112, 1.5), (1158, 0)]


def test_other_graphs_between_the_replays_are_told_apart_by_their_nodes(tmp_path: Path) -> None:
    events = steps_of(2) + made.replay(1250, 77, grids=(8, 8, 8))
    samples = [made.unseen(0, 1), made.unseen(1, 2)]
    recording = made.recording(samples, graph_marks=marks_of(0, 2), captured_graphs=(made.captured(),))
    outcome = merged(tmp_path, events, recording)
    assert [p.host["graph"].start_us for p in placements(outcome) if p] == [1000, 1500]


def test_real_replays_of_a_compiled_function_are_told_by_the_count_of_the_device(tmp_path: Path) -> None:
    """Even the model's hooks are inside: three steps, three launches, whose order the counter gives."""
    path = tmp_path / "trace.json"
    path.write_bytes(gzip.decompress((H200 / "compiled_function.pt.trace.json.gz").read_bytes()))
    outcome = merge_recording(path, [read_trace(path).recording])
    events = json.loads(path.read_bytes())["traceEvents"]
    launches = sorted((e for e in events if e["name"] == "cudaGraphLaunch"), key=lambda e: e["ts"])
    placed = sorted(outcome.placed[0], key=lambda sample: (sample.call, sample.layer))
    assert len(launches) == 3 and [s.layer for s in placed] == [0, 1] * 3
    assert all(sample.host_start_ns == 0 for sample in placed)
    for i, sample in enumerate(placed):
        launch = launches[i // 2]
        work = [e for e in events if e.get("args", {}).get("correlation") == launch["args"]["correlation"]]
        kernels = [e for e in work if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        assert sum("index_put" in e["name"] for e in kernels) >= 1
        assert sample.placement is not None
        assert sample.placement.host == {"graph": Span(launch["ts"], launch["dur"])}
        assert sample.placement.device.keys() == {"graph"}
        assert sample.placement.device["graph"].start_us == min(e["ts"] for e in kernels)
    assert outcome.lost.unplaced == {} and outcome.lost.untimed == {reasons.FUSED: 6}
    assert broken_rules(path) == set()


def compiled_steps(*replays: int) -> list[Any]:
    """As `steps_of`, of graphs that torch.compile made."""
    marks = [e for e in steps_of(*replays) if e["name"] != "cudaGraphLaunch" and e["cat"] != "kernel"]
    launches = [
        made.replay(10_000 * step + 1000 + 500 * i, 10 * step + i + 1, compiled=True)
        for step, count in enumerate(replays)
        for i in range(count)
    ]
    return marks + [event for replay in launches for event in replay]


COMPILED = {"captured_graphs": (), "graphs_compiled": True}
DRIVER = made.event("cuda_driver", "cuLaunchKernel", 1900, 2, correlation=9)
LATE_SCATTER = made.event("kernel", "at::index_put_kernel", 1640, 3, pid=0, tid=made.STREAM, correlation=98)


@pytest.mark.parametrize(
    ("events", "count", "expected"),
    [
        (compiled_steps(2), 2, [1000, 1500]),
        # A graph that scatters nothing, such as one that samples the next token, cannot have written.
        (compiled_steps(2) + made.replay(1250, 77, grids=(8, 8, 8)), 2, [1000, 1500]),
        (compiled_steps(2) + made.replay(1250, 77, grids=(8, 8, 8), compiled=True), 2, reasons.OTHER_COUNT),
        (compiled_steps(2), 1, reasons.OTHER_COUNT),
        ([*compiled_steps(2), DRIVER], 2, reasons.UNKNOWN_GRAPH),
        ([*compiled_steps(2), LATE_SCATTER], 2, reasons.UNKNOWN_GRAPH),
    ],
    ids=["told", "another graph", "another that scatters", "count", "triton beside", "scatter beside"],
)
def test_replays_of_compiled_functions_are_told_or_refused(
    tmp_path: Path, events: list[Any], count: int, expected: list[int] | str
) -> None:
    samples = [made.unseen(i, i + 1) for i in range(count)]
    recording = made.recording(samples, graph_marks=marks_of(0, count), **COMPILED)
    outcome = merged(tmp_path, events, recording)
    if isinstance(expected, str):
        assert outcome.lost.unplaced == {expected: count}
    else:
        assert [p.host["graph"].start_us for p in placements(outcome) if p] == expected


BROKEN = made.captured(problem="the captured graph is no plain chain")


@pytest.mark.parametrize(
    ("counts", "changes", "events", "reason"),
    [
        ((0, 3), {}, steps_of(2), reasons.OTHER_COUNT),
        ((0, 2), {"captured_graphs": ()}, steps_of(2), reasons.UNKNOWN_GRAPH),
        ((0, 2), {"captured_graphs": (BROKEN,), "graphs_compiled": True}, steps_of(2), reasons.UNKNOWN_GRAPH),
        (
            (0, 3),
            {"captured_graphs": (BROKEN,)},
            steps_of(2) + made.replay(1250, 77, grids=(8, 8, 8)),
            reasons.OTHER_COUNT,
        ),
        ((0, 2), {}, steps_of(0), reasons.NO_LAUNCH),
        ((0, 2), {"graph_marks": ()}, steps_of(2), reasons.NO_MARK),
        (
            (0, 2),
            {},
            [e for e in steps_of(2) if e["args"].get("correlation") != 9000],
            reasons.NO_MARK,
        ),
        (
            (0, 2),
            {},
            steps_of(2, stream=4),
            reasons.OTHER_STREAM,
        ),
    ],
    ids=["count", "unknown", "compiled too", "two graphs", "no launch", "no mark", "no copy", "stream"],
)
def test_what_cannot_be_told_is_refused(
    tmp_path: Path, counts: tuple[int, ...], changes: dict[str, Any], events: list[Any], reason: str
) -> None:
    samples = [made.unseen(0, 1), made.unseen(1, 2)]
    given = {"graph_marks": marks_of(*counts), "captured_graphs": (made.captured(),)} | changes
    outcome = merged(tmp_path, events, made.recording(samples, **given))
    assert placements(outcome) == [None, None]
    assert outcome.lost.unplaced == {reason: 2}


def test_without_nodes_the_counts_still_tell_replays_of_one_graph(tmp_path: Path) -> None:
    samples = [made.unseen(0, 1), made.unseen(1, 2)]
    recording = made.recording(samples, graph_marks=marks_of(0, 2), captured_graphs=(BROKEN,))
    outcome = merged(tmp_path, steps_of(2), recording)
    assert [p.host["graph"].start_us for p in placements(outcome) if p] == [1000, 1500]
    assert outcome.lost.untimed == {"the captured graph is no plain chain": 2}


def test_replays_beside_forwards_that_the_host_saw(tmp_path: Path) -> None:
    """Forward 2 of three was eager. All of the others were kept, so their order is theirs."""
    marks = (made.mark(10, 0, seen=0), made.mark(9000, 3, seen=1))
    samples = [made.unseen(0, 1), made.unseen(1, 3)]
    given = {"graph_marks": marks, "captured_graphs": (made.captured(),)}
    outcome = merged(tmp_path, steps_of(2), made.recording(samples, **given))
    assert [p.host["graph"].start_us for p in placements(outcome) if p] == [1000, 1500]
    outcome = merged(tmp_path, steps_of(2), made.recording(samples[1:], **given))
    assert outcome.lost.unplaced == {reasons.MIXED: 1}


def test_samples_of_another_trace_of_the_run_are_left_out(tmp_path: Path) -> None:
    marks = (*marks_of(0, 1), made.mark(200_000, 1), made.mark(300_000, 2))
    samples = [made.unseen(0, 1), made.unseen(1, 2)]
    recording = made.recording(samples, graph_marks=marks, captured_graphs=(made.captured(),))
    outcome = merged(tmp_path, steps_of(1), recording)
    assert [s.graph_forward for s in outcome.placed[0]] == [1]
    assert outcome.lost.unplaced == {}


def test_two_tracers_count_their_own_forwards(tmp_path: Path) -> None:
    """Models of one class have routers of one name; each has its own counter, copied at its own marks."""
    other = [f"{grid},1,1 64,1,1" for grid in made.GRIDS[:5]]
    small = made.replay(1250, 77)
    for event in small[1:]:
        event["args"]["block"] = [64, 1, 1]
    events = [*steps_of(1), *small, *made.copy_of_mark(12, 9100), *made.copy_of_mark(9010, 9101)]
    one = made.recording([made.unseen(0, 5)], graph_marks=marks_of(4, 5), captured_graphs=(made.captured(),))
    marks = (made.mark(12, 30), made.mark(9010, 31))
    two = made.recording([made.unseen(0, 31)], graph_marks=marks, captured_graphs=(made.captured(other),))
    path = made.write_trace(tmp_path / "trace.json", events)
    outcome = merge_recording(path, [one, two])
    places = [samples[0].placement for samples in outcome.placed]
    assert [p.device["router"].start_us for p in places if p] == [1112, 1362]
    assert read_trace(path).recording.graph_marks == ()
    assert broken_rules(path) == set()


# -- nodes --------------------------------------------------------------------------------------------


def of_one_replay(tmp_path: Path, events: list[Any], **knowledge: Any) -> Placement:
    recording = made.recording([made.unseen(0, 1)], graph_marks=marks_of(0, 1), **knowledge)
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    path.mkdir()
    (place,) = placements(merged(path, events, recording))
    assert place is not None
    return place


def with_replay(**options: Any) -> list[Any]:
    return made.copy_of_mark(10, 9000) + made.replay(1000, 1, **options) + made.copy_of_mark(9000, 9001)


def test_nodes_are_told_by_their_ids_whatever_their_order_and_stream(tmp_path: Path) -> None:
    """Annotations of torch: the router's nodes 13 and 11, the experts' 15."""
    place = of_one_replay(
        tmp_path,
        with_replay(node_ids=(10, 11, 12, 13, 14, 15)),
        annotated_nodes={"moe.router/L00": (13, 11), "moe.experts/L00": (15,), "moe.router/L07": (12,)},
        captured_graphs=(BROKEN,),
    )
    assert place.device["router"] == Span(1112, 34) and place.busy_us["router"] == 20
    assert place.device["experts"] == Span(1160, 10)


@pytest.mark.parametrize(
    "given",
    [
        {"captured_graphs": (made.captured(made.NODES[1:]), BROKEN)},  # not these nodes
        {"captured_graphs": (made.captured(), made.captured(shift=1))},  # two that disagree
        {"captured_graphs": (made.captured([*made.NODES, "7,1,1 128,1,1"]),)},  # longer than the replay
    ],
    ids=["other nodes", "ambiguous", "longer"],
)
def test_ambiguous_or_unknown_nodes_give_no_latency(tmp_path: Path, given: dict[str, Any]) -> None:
    place = of_one_replay(tmp_path, with_replay(), **given)
    assert place.device.keys() == {"graph"} and place.busy_us == {}


def test_a_replay_on_several_streams_is_no_chain(tmp_path: Path) -> None:
    events = with_replay(streams=(3, 3, 4, 3, 3, 3))
    recording = made.recording(
        [made.unseen(0, 1)], graph_marks=marks_of(0, 1), captured_graphs=(made.captured(),)
    )
    outcome = merged(tmp_path, events, recording)
    assert outcome.lost.unplaced == {reasons.OTHER_STREAM: 1}


@pytest.mark.parametrize("shown", [True, False])
def test_a_memset_before_the_router_is_taken_into_account(tmp_path: Path, shown: bool) -> None:
    """Node 1 of the capture is a memset, so the router's kernels are its nodes 2 and 3."""
    graph = made.captured(shift=1)
    graph = replace(graph, nodes=6, copies=(1,), calls=(replace(graph.calls[0], last=4),))
    memset = made.event("gpu_memset", "Memset", 1110, 1, pid=0, tid=made.STREAM, correlation=1)
    place = of_one_replay(tmp_path, with_replay() + [memset] * shown, captured_graphs=(graph,))
    assert place.device["router"] == Span(1112, 22)


def test_two_captures_that_agree_are_no_ambiguity(tmp_path: Path) -> None:
    place = of_one_replay(tmp_path, with_replay(), captured_graphs=(made.captured(), made.captured()))
    assert place.device["router"] == Span(1112, 22)


# -- the file -----------------------------------------------------------------------------------------


def test_what_placing_knows_travels_in_the_file(tmp_path: Path) -> None:
    recording = made.recording(
        [made.unseen(0, 1)],
        graph_marks=marks_of(0, 1),
        captured_graphs=(made.captured(),),
        annotated_nodes={"moe.router/L00": (1, 2)},
        graphs_compiled=True,
    )
    again = decode_recording(json.loads(encode_recording(recording)))
    for name in ("graph_marks", "captured_graphs", "annotated_nodes", "graphs_compiled"):
        assert getattr(again, name) == getattr(recording, name)
    path = made.write_trace(tmp_path / "trace.json", with_replay())
    before = path.read_bytes()
    first = merge_recording(path, [recording]).placed[0]
    read = read_trace(path).recording
    assert [s.placement for s in read.samples] == [s.placement for s in first]
    second = merge_recording(path, [read]).placed[0]  # what the file holds is enough to place again
    assert [s.placement for s in second] == [s.placement for s in first]
    assert without_additions(path) == before


def test_files_of_older_releases_are_read() -> None:
    payload = json.loads(encode_recording(made.recording([made.unseen(0, 1)])))
    assert "graphs" not in payload
    del payload["samples"]["graph_forward"], payload["lost"]["unplaced"], payload["lost"]["untimed"]
    payload["samples"]["placement"] = [[[[1.0, 2.0], None, None], [None, None, None]]]
    read = decode_recording(payload)
    assert read.samples[0].placement == Placement(host={"router": Span(1.0, 2.0)}, device={})
    assert read.samples[0].graph_forward is None and read.lost == Lost()


def test_figures_of_replays_are_named_as_such() -> None:
    assert all("graph" in name for name in REPLAY_FIGURES)


# -- readers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["compiled_model", "by hand"])
def graphs_trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged trace whose calls are all in graphs: placed with their forward alone, or with routers."""
    folder = tmp_path_factory.mktemp("graphs")
    if request.param == "compiled_model":
        path = folder / "a.pt.trace.json.gz"
        path.write_bytes((H200 / "compiled_model.pt.trace.json.gz").read_bytes())
        merge_recording(path, [read_trace(path).recording])
        return path
    path = made.write_trace(folder / "a.pt.trace.json", steps_of(1, 2))
    samples = [made.unseen(i, 1 + i) for i in range(3)]
    merge_recording(
        path,
        [made.recording(samples, graph_marks=marks_of(0, 1, 3), captured_graphs=(made.captured(),))],
    )
    return path


@pytest.mark.parametrize(
    "command",
    [
        ["check", "{}"],
        ["report", "{}"],
        ["report", "{}", "--format", "json"],
        ["report", "{}", "--html", "{}.html"],
        ["report", "{}", "--step", "0"],
        ["diff", "{}", "{}"],
        ["export", "{}", "--to", "csv", "--out", "{}.csv"],
        ["export", "{}", "--to", "eplb", "--out", "{}.json"],
        ["export", "{}", "--to", "perfetto", "--out", "{}.pftrace"],
        ["placement", "{}", "--ranks", "2"],
    ],
    ids=lambda command: " ".join(command).replace("{}", "").replace("  ", " ").strip(),
)
def test_every_command_reads_calls_inside_graphs(
    graphs_trace: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from moe_trace.cli import main

    code = main([part.format(graphs_trace) for part in command])
    assert code == 0, capsys.readouterr()


def test_a_perfetto_trace_has_a_lane_of_replays(graphs_trace: Path, tmp_path: Path) -> None:
    perfetto = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    from moe_trace.read.perfetto import write_perfetto

    recording = read_trace(graphs_trace).recording
    write_perfetto(recording.samples, tmp_path / "a.pftrace")
    trace = perfetto.Trace.FromString((tmp_path / "a.pftrace").read_bytes())
    names = {
        p.track_descriptor.uuid: p.track_descriptor.name
        for p in trace.packet
        if p.HasField("track_descriptor")
    }
    assert set(REPLAY_FIGURES) <= set(names.values())
    begins = [
        p
        for p in trace.packet
        if p.HasField("track_event") and p.track_event.type == perfetto.TrackEvent.TYPE_SLICE_BEGIN
    ]
    replays = [p.timestamp for p in begins if names[p.track_event.track_uuid] == "graph"]
    starts = {s.placement.device["graph"].start_us for s in recording.samples if s.placement}
    assert replays == sorted(round(start * 1000) for start in starts) and len(replays) == 3
    timed = any(s.placement and "router" in s.placement.device for s in recording.samples)
    assert ("router" in names.values()) is timed is ("load max÷mean" in names.values())


@pytest.mark.parametrize(
    "view", ["overview", "routing", "heat", "layer", "time", "timeline", "kernels", "compare", "ranks"]
)
def test_every_view_of_the_tab_answers(graphs_trace: Path, view: str) -> None:
    from moe_trace.show.tensorboard.catalog import Catalogs
    from moe_trace.show.tensorboard.data import Dashboard

    dashboard = Dashboard(Catalogs(str(graphs_trace.parent)))
    (run,) = dashboard.answer("runs", {})["runs"]
    name = {"run": run["run"], "trace": graphs_trace.name}
    other = {"run_b": run["run"], "trace_b": graphs_trace.name}
    answer = dashboard.answer(view, {**name, **other, "site": "L00"})
    assert "broken" not in answer and "error" not in answer
    json.loads(json.dumps(answer), parse_constant=pytest.fail)

"""Tests that each exported format can be read by its real reader."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow.parquet
import pytest
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import CounterDescriptor, Trace, TrackEvent

from moe_trace.cli import main
from moe_trace.data.display.columns import DEFINITIONS
from moe_trace.read.reader import read_summary
from moe_trace.read.rows import COLUMNS
from paths import DATA
from tiny_trace import write_tiny

H200 = DATA / "h200" / "decode_grouped_mm.pt.trace.json.gz"


def export(source: Path, form: str, target: Path, *options: str) -> Path:
    with contextlib.redirect_stderr(io.StringIO()):
        assert main(["export", str(source), "--to", form, "--out", str(target), *options]) == 0
    return target


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_rows_equal_the_summary(tmp_path: Path, form: str) -> None:
    target = export(H200, form, tmp_path / f"calls.{form}")
    frame = pandas.read_csv(target) if form == "csv" else pandas.read_parquet(target)
    summary = read_summary(H200)
    assert len(frame) == len(summary.samples) == 8
    assert list(frame.columns[:3]) == ["trace", "site", "name"]
    for router in summary.routers:
        rows = frame[frame["site"] == router.info.site]
        assert rows["tokens"].sum() == router.tokens
        counts = [np.array(c.split(), int) if form == "csv" else c for c in rows["assignments"]]
        assert np.array_equal(sum(counts), router.assignments)
        host, busy = router.latency.host, router.latency.device_busy
        assert host is not None and busy is not None
        assert rows["router_host_us"].median() == pytest.approx(host.p50)
        assert rows["router_device_busy_us"].sum() == pytest.approx(busy.total)
        assert rows["expert_flops"].sum() == router.flops.experts
    assert summary.phases is not None
    for phase, time in summary.phases.total.forward.items():
        assert frame[f"phase_{phase}_device_us"].sum() == pytest.approx(time.device_busy_us)
    phases = frame[
        [c for c in frame.columns if c.startswith("phase_") and c.endswith("_host_us") and "back" not in c]
    ]
    assert np.allclose(phases.sum(axis=1) + frame["block_host_gap_us"], frame["block_host_us"])


def test_parquet_types_do_not_depend_on_the_data(tmp_path: Path) -> None:
    """A CPU trace has no device times, and its columns are of the same types all the same."""
    gpu = pyarrow.parquet.read_schema(export(H200, "parquet", tmp_path / "a.parquet"))
    no_logits = write_tiny(tmp_path / "a.json", calls=1)
    tiny = pyarrow.parquet.read_schema(export(no_logits, "parquet", tmp_path / "b.parquet"))
    assert gpu.equals(tiny)


def test_data_frame_equals_parquet(tmp_path: Path) -> None:
    frame = read_summary(H200).to_dataframe()
    stored = pandas.read_parquet(export(H200, "parquet", tmp_path / "a.parquet")).drop(columns="trace")
    assert list(frame.columns) == list(stored.columns)
    assert np.allclose(frame["router_start_us"], stored["router_start_us"])


def test_files_and_frames_say_what_their_columns_are(tmp_path: Path) -> None:
    """By the definitions that reports have, and with a unit wherever the name has one."""
    said = read_summary(H200).to_dataframe().attrs["columns"]
    schema = pyarrow.parquet.read_schema(export(H200, "parquet", tmp_path / "a.parquet"))
    assert list(said) == schema.names[1:] == list(COLUMNS)
    for name, of_frame in said.items():
        of_file = {key.decode(): value.decode() for key, value in schema.field(name).metadata.items()}
        assert of_frame == {key: of_file[key] for key in ("label", "unit", "definition")}
        assert of_frame["label"] and of_frame["definition"]
        assert (of_frame["unit"] == "µs") == name.endswith("_us")
    assert said["load_cv"]["definition"] == DEFINITIONS["CV"]
    assert said["router_entropy"]["unit"] == "nats"


def test_eplb_is_layers_by_experts(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "a.json", counts=lambda layer, call: (1, 2, 3 + layer, 2 - layer))
    array = np.load(export(source, "eplb", tmp_path / "a.npy"), allow_pickle=False)
    assert array.dtype == np.int64 and array.tolist() == [[3, 6, 9, 6], [3, 6, 12, 3]]
    plain = json.loads(export(source, "eplb", tmp_path / "a.eplb.json").read_text())
    assert plain["counts"] == array.tolist() and [layer["site"] for layer in plain["layers"]] == [
        "L00",
        "L01",
    ]
    one = np.load(export(source, "eplb", tmp_path / "b.npy", "--layer", "1", "--step", "0"))
    assert one.tolist() == [[1, 2, 4, 1]]


# -- perfetto -----------------------------------------------------------------------------------------


def packets(path: Path) -> tuple[dict[int, Any], list[Any]]:
    trace = Trace()
    trace.ParseFromString(path.read_bytes())
    tracks = {
        p.track_descriptor.uuid: p.track_descriptor for p in trace.packet if p.HasField("track_descriptor")
    }
    return tracks, [p for p in trace.packet if p.HasField("track_event")]


def test_perfetto_tracks_parents_and_units(tmp_path: Path) -> None:
    tracks, _ = packets(export(write_tiny(tmp_path / "a.json"), "perfetto", tmp_path / "a.pftrace"))
    [parent] = [t for t in tracks.values() if not t.HasField("parent_uuid")]
    assert parent.name == "MoE routing (rank 0)"
    children = [t for t in tracks.values() if t is not parent]
    assert {t.parent_uuid for t in children} == {parent.uuid}
    units = {t.name: (t.counter.unit_name, t.counter.unit) for t in children if t.HasField("counter")}
    unspecified = CounterDescriptor.UNIT_UNSPECIFIED
    assert units == {
        "load max÷mean": ("×", unspecified),
        "router entropy (nats)": ("nats", unspecified),
        "active experts": ("experts", CounterDescriptor.UNIT_COUNT),
        "expert TFLOP/s (with gaps)": ("TFLOP/s", unspecified),
        "tokens": ("tokens", CounterDescriptor.UNIT_COUNT),
        "memory": ("", CounterDescriptor.UNIT_SIZE_BYTES),
    }
    assert {t.name for t in children if not t.HasField("counter")} == {"block", "router", "experts"}


def test_perfetto_values_and_slices(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "a.json")
    summary = read_summary(source)
    tracks, events = packets(export(source, "perfetto", tmp_path / "a.pftrace"))
    by_track: dict[str, list[Any]] = {}
    for packet in events:
        by_track.setdefault(tracks[packet.track_event.track_uuid].name, []).append(packet)
    entropy = [(p.timestamp, p.track_event.double_counter_value) for p in by_track["router entropy (nats)"]]
    expected = []
    for sample in sorted(summary.samples, key=lambda s: s.host_start_ns):
        assert sample.placement is not None
        span = sample.placement.device["block"]
        expected += [(round(span.start_us * 1000), sample.router_entropy), (round(span.end_us * 1000), 0.0)]
    assert entropy == expected
    for kind in ("block", "router", "experts"):
        slices = by_track[kind]
        begins, ends = slices[::2], slices[1::2]
        assert {p.track_event.type for p in begins} == {TrackEvent.TYPE_SLICE_BEGIN}
        assert {p.track_event.type for p in ends} == {TrackEvent.TYPE_SLICE_END}
        found = [(b.track_event.name, b.timestamp, e.timestamp) for b, e in zip(begins, ends, strict=True)]
        spans = []
        for sample in sorted(summary.samples, key=lambda s: s.host_start_ns):
            assert sample.placement is not None
            span = sample.placement.device[kind]  # type: ignore[index]
            spans.append((sample.site, round(span.start_us * 1000), round(span.end_us * 1000)))
        assert found == spans
    notes = {a.name: a for a in by_track["router"][0].track_event.debug_annotations}
    assert notes["tokens"].int_value == 4 and notes["stage"].string_value == "prefill"
    assert [v.int_value for v in notes["assignments"].array_values] == [1, 2, 3, 2]
    assert notes["load max÷mean"].double_value == 1.5


def test_perfetto_of_a_real_trace(tmp_path: Path) -> None:
    tracks, events = packets(export(H200, "perfetto", tmp_path / "a.pftrace"))
    assert len(events) >= 8 * 2 * (3 + 5)
    assert all(p.trusted_packet_sequence_id for p in events)
    times = [p.timestamp for p in events]
    summary = read_summary(H200)
    starts = [s.placement.device["block"].start_us * 1000 for s in summary.samples if s.placement is not None]
    assert min(times) == round(min(starts)) and len(tracks) == 1 + 3 + 6


def test_errors(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "a.json")
    for arguments, code, message in (
        (["--to", "csv", "--out", str(source)], 6, "choose another name"),
        (["--to", "csv", "--out", str(tmp_path / "no" / "a.csv")], 6, "not a folder"),
    ):
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            assert main(["export", str(source), *arguments]) == code
        assert message in err.getvalue()
    assert list(tmp_path.iterdir()) == [source]

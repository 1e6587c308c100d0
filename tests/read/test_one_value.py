"""Tests that counter, rows, report, JSON, tab and notebook agree to the digit on every value."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from brute_force import load
from moe_trace.data.display.tables import share
from moe_trace.data.schema import BAND_PID
from moe_trace.read.ask import ask
from moe_trace.read.reader import TraceSummary, read_recording, read_summary
from moe_trace.show.csv import render_csv
from moe_trace.show.html import render_fragment
from moe_trace.show.json import render_json
from moe_trace.show.tensorboard.overview import cards, facts
from moe_trace.show.text import render_text
from moe_trace.timeline.merge import merge_recording
from paths import DATA

TRACES = (
    "h100/prefill_decode_16_layers",
    "h100/train_checkpointed",
    "h200/decode_grouped_mm",
    "h200/prefill_eager",
)
# counter of the timeline -> column of the rows; None where the column is worked out below
COUNTERS = {
    "load max÷mean": "load_max_over_mean",
    "router entropy (nats)": "router_entropy",
    "active experts": "active_experts",
    "expert TFLOP/s (with gaps)": None,
}


@pytest.fixture(scope="module", params=TRACES)
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trace, merged again by this release."""
    source = DATA / f"{request.param}.pt.trace.json.gz"
    path = tmp_path_factory.mktemp("one") / "trace.json.gz"
    path.write_bytes(source.read_bytes())
    merge_recording(path, [read_recording(path)])
    return path


@pytest.fixture(scope="module")
def summary(merged: Path) -> TraceSummary:
    return read_summary(merged)


@pytest.fixture(scope="module")
def report(summary: TraceSummary) -> dict[str, Any]:
    return json.loads(render_json(summary))


def counters(path: Path) -> dict[str, dict[float, float]]:
    """Counter -> when it takes a value -> the value."""
    found: dict[str, dict[float, float]] = defaultdict(dict)
    for event in load(path)["traceEvents"]:
        if event["ph"] == "C" and event["pid"] >= BAND_PID and event["args"]["value"]:
            found[event["name"]][event["ts"]] = event["args"]["value"]
    return found


def rows_of(summary: TraceSummary) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(render_csv([summary]))))


def test_counters_are_the_rows_of_the_csv(merged: Path, summary: TraceSummary) -> None:
    shown, rows = counters(merged), rows_of(summary)
    assert set(shown) == set(COUNTERS)
    for counter, column in COUNTERS.items():
        assert len(shown[counter]) == len(rows), counter
        for row in rows:
            value = shown[counter][float(row["block_device_start_us"])]
            if column is not None:
                assert value == float(row[column]), (counter, row["site"])
            else:
                span_us = float(row["experts_device_span_us"])
                assert value == float(row["expert_flops"]) / span_us / 1e6


def test_the_report_adds_the_rows_up(summary: TraceSummary, report: dict[str, Any]) -> None:
    rows = rows_of(summary)
    flops = sum(float(row["expert_flops"]) for row in rows)
    span_us = sum(float(row["experts_device_span_us"]) for row in rows)
    busy_us = sum(float(row["phase_experts_device_us"]) for row in rows)
    experts = report["speed"]["experts"]
    assert experts["flops_per_s_with_gaps"] == pytest.approx(1e6 * flops / span_us, rel=1e-12)
    assert experts["flops_per_s"] == pytest.approx(1e6 * flops / busy_us, rel=1e-12)
    assert experts["flops_per_s"] > experts["flops_per_s_with_gaps"], "two figures, two names"
    for router in report["routers"]:
        mine = [r for r in rows if r["name"] == router["name"] and r["phase"] == "forward"]
        counts = [sum(int(r["assignments"].split()[e]) for r in mine) for e in range(router["num_experts"])]
        assert counts == router["assignments"] and len(mine) == router["calls"]
        assert router["load"]["max_over_mean"] == max(counts) * len(counts) / sum(counts)
        tokens = sum(int(r["tokens"]) for r in mine)
        entropy = sum(float(r["router_entropy"]) * int(r["tokens"]) for r in mine) / tokens
        assert router["router"]["entropy_mean"] == pytest.approx(entropy, rel=1e-12)
        host = sum(float(r["router_host_us"]) for r in mine)
        assert router["latency_us"]["host"]["total"] == pytest.approx(host, rel=1e-12)


def test_the_tab_shows_values_of_the_report(summary: TraceSummary, report: dict[str, Any]) -> None:
    """Each number of the tab's first page names its place in the JSON, and is what stands there."""
    checked = 0
    for part in [*facts(summary), *(card for one in summary.by_stage().values() for card in cards(one))]:
        if part.get("path"):
            checked += 1
    assert checked >= 5
    for stage, one in summary.by_stage().items():
        plain = report["stages"].get(stage, report)
        for card in cards(one):
            if card["path"]:
                assert at(plain, card["path"]) == card["value"], card["label"]


def at(plain: Any, path: str) -> Any:
    for key in path.split("."):
        plain = plain[int(key)] if isinstance(plain, list) else plain[key]
    return plain


def test_the_notebook_shows_values_of_the_report(summary: TraceSummary, report: dict[str, Any]) -> None:
    page = " ".join(render_fragment(summary).split())
    for finding in report["findings"]:
        number = finding["sentence"].split(" ")[-1]
        assert number.strip(".").replace("&", "&amp;") in page
    for router in report["routers"]:
        assert router["site"] in page


def test_stages_and_the_whole_have_the_same_names(report: dict[str, Any]) -> None:
    for stage in report["stages"].values():
        assert set(stage) <= set(report)
        assert [set(r) for r in stage["routers"]] == [set(r) for r in report["routers"]]
        whole = report["totals"]
        assert set(stage["totals"]) == set(whole)
    if report["stages"]:
        for name in ("calls", "tokens", "assignments", "flops_experts"):
            assert sum(s["totals"][name] for s in report["stages"].values()) == report["totals"][name]


def test_shares_of_passes_and_chance_have_one_value() -> None:
    """JSON, Python, answer and report, of a training trace."""
    summary = read_summary(DATA / "h100/train_checkpointed.pt.trace.json.gz")
    report = json.loads(render_json(summary))
    (answer,) = ask(summary, questions=["share"])
    rows = {row["part"]: row["moe_of_model"] for row in answer.rows}
    text = " ".join(render_text(summary).split())
    for name in ("forward", "backward"):
        value = report["phases"]["whole"][f"moe_share_of_{name}"]
        assert 0.5 < value < 0.7 and value == rows[name]
        assert f"{share(value)} of its {name}" in text
    assert rows["all"] == report["phases"]["whole"]["moe_share_of_model"] == summary.moe_time_fraction
    (imbalance,) = ask(summary, questions=["imbalance"])
    worst = next(r for r in report["routers"] if r["site"] == imbalance.figures["layers"][0])
    for name in ("p_value", "p_value_clustered"):
        assert imbalance.figures[name] == worst["chance"][name] < 0.001

"""What `report`, `diff`, `check` and `export` print and return."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_trace
from moe_trace.cli import main
from moe_trace.data.schema import RoutingSample
from moe_trace.read.check import RULES
from moe_trace.read.reader import read_summary
from paths import DATA
from spliced import recording_in
from tiny_trace import write_tiny

H200 = DATA / "h200"


def run(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


# -- report -------------------------------------------------------------------------------------------


def test_json_has_the_promised_keys(tmp_path: Path) -> None:
    """Keys that others rely on: they are added to, never renamed."""
    code, out, _ = run("report", write_tiny(tmp_path / "a.json"), "--format", "json")
    report = json.loads(out)
    assert code == 0 and report["schema_version"] == 1 and report["trace"].endswith("a.json")
    assert set(report["model"]) >= {"name", "class", "num_layers"}
    assert set(report["lost"]) >= {"samples_without_range", "ranges_without_sample", "overwritten"}
    first = report["routers"][0]
    assert first["site"] == "L00" and first["assignments"] == [3, 6, 9, 6]
    assert (first["layer"], first["num_experts"], first["top_k"]) == (0, 4, 2)
    assert (first["calls"], first["tokens"], first["skipped"], first["padding_assignments"]) == (3, 12, 0, 0)
    assert set(first["load"]) == {"max_over_mean", "cv", "gini", "entropy", "active_experts", "dead_experts"}
    assert first["load"]["max_over_mean"] == 1.5 and first["load"]["dead_experts"] == []
    means = {"entropy_mean", "confidence_mean", "top1_prob_mean", "topk_mass_mean", "z_loss_mean", "k_mean"}
    means |= {"aux_loss_mean"}
    assert set(first["router"]) == {*means, "k_histogram"}
    assert first["router"]["entropy_mean"] == pytest.approx(1.01)
    clocks = first["latency_us"]
    assert set(clocks["host"]) == {"mean", "std", "min", "max", "p50", "p95", "p99", "total"}
    assert (clocks["host"]["p50"], clocks["device_span"]["p50"], clocks["device_busy"]["p50"]) == (20, 20, 8)
    assert first["flops"] == {"router": 64 * 12, "experts": 24_000, "shared": 0, "total": 24_768}
    assert {"totals", "phases", "speed", "imbalance", "findings", "notes"} <= set(report)


def test_phases_of_the_tiny_trace(tmp_path: Path) -> None:
    """Round numbers, by hand."""
    report = json.loads(run("report", write_tiny(tmp_path / "a.json"), "--format", "json")[1])
    layer = report["phases"]["layers"][0]
    busy = {phase: time["device_busy_us"] / 3 for phase, time in layer["forward"].items()}
    assert busy == {"router": 8, "dispatch": 4, "experts": 24, "combine": 4, "shared": 0, "other": 0}
    assert (layer["device_span_us"] / 3, layer["device_gap_us"] / 3, layer["device_overlap_us"]) == (
        74,
        34,
        0,
    )
    assert (layer["block_host_us"] / 3, layer["host_gap_us"] / 3) == (100, 60)
    assert report["phases"]["whole"]["moe_share_of_model"] == 1.0


def test_kernels_that_run_at_once_overlap(tmp_path: Path) -> None:
    """The router's kernel goes on for 40 µs: 4 µs beside the index, 2 beside the first product."""
    path = write_tiny(tmp_path / "a.json", stretch=lambda layer, call, name: 5 if "linear" in name else 1)
    layer = json.loads(run("report", path, "--format", "json")[1])["phases"]["layers"][0]
    busy = sum(time["device_busy_us"] for time in layer["forward"].values()) / 3
    gap, overlap, span = (layer[f"device_{name}_us"] / 3 for name in ("gap", "overlap", "span"))
    assert (busy, gap, overlap, span) == pytest.approx((72, 8, 6, 74))


@pytest.mark.parametrize("name", sorted(path.name for path in H200.glob("*.gz")))
def test_text_reads_at_80_columns(name: str) -> None:
    code, out, _ = run("report", H200 / name)
    assert code == 0
    body = out.splitlines()[1:]  # the first line is the path
    assert max(map(len, body)) <= 80, max(body, key=len)
    assert all(c == "\n" or c.isprintable() for c in out)
    assert "Breakdown forward" in out and "Findings" in out and "MoE is" in out


def test_long_labels_and_large_numbers_fit_too(tmp_path: Path) -> None:
    path = write_tiny(
        tmp_path / "a.json",
        sites=["encoder.L00.vision", "L01"],
        counts=lambda layer, call: (10**8, 10**8, 0, 0),
        stretch=lambda layer, call, op: 1e6,
    )
    code, out, _ = run("report", path)
    body = out.splitlines()[1:]
    assert code == 0 and max(map(len, body)) <= 80, max(body, key=len)


def test_text_golden_figures() -> None:
    """The printed shares are recomputed from the JSON, so a wrong text cannot be blessed."""
    path = H200 / "prefill_grouped_mm.pt.trace.json.gz"
    text = run("report", path)[1].replace("\n", " ")
    report = json.loads(run("report", path, "--format", "json")[1])
    whole = report["phases"]["whole"]
    assert f"MoE is {100 * whole['moe_share_of_model']:.1f} % of the model's busy device time" in text
    forward = report["phases"]["total"]["forward"]
    router = 100 * forward["router"]["device_busy_us"] / whole["moe_work_us"]
    assert f"router {router:.1f} %" in text
    assert report["speed"]["device"] == "NVIDIA H200"
    assert report["speed"]["peak_flops_per_s"] == pytest.approx(989.4e12)


def test_filters(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "a.json", calls=4)
    for options, calls, routers in (
        (["--layer", "1"], 4, 1),
        (["--layer", "L00,model.layers.1.mlp.gate"], 8, 2),
        (["--step", "1-2"], 4, 2),
        (["--phase", "prefill"], 2, 2),
        (["--phase", "decode", "--layer", "0", "--step", "0,3"], 1, 1),
    ):
        report = json.loads(run("report", path, "--format", "json", *options)[1])
        assert (report["totals"]["calls"], len(report["routers"])) == (calls, routers), options
        assert report["phases"]["total"]["calls"] == calls
        assert (report["phases"]["whole"]["moe_share_of_model"] is None) == (
            "--phase" in options or "--step" in options
        )
    assert json.loads(run("report", path, "--layer", "0", "--format", "json")[1])["phases"]["whole"][
        "moe_share_of_model"
    ] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "9"], "no call is left"),
        (["--step", "x"], "expected steps such as"),
        (["--phase", "train"], "no call is left"),
        (["--peak-tflops", "-1"], "expected a number above 0"),
    ],
)
def test_filter_errors(tmp_path: Path, options: list[str], message: str) -> None:
    code, _, err = run("report", write_tiny(tmp_path / "a.json"), *options)
    assert code == 2 and message in err


def test_folder_adds_up_and_several_paths(tmp_path: Path) -> None:
    one = write_tiny(tmp_path / "one.pt.trace.json", calls=2)
    two = write_tiny(tmp_path / "two.pt.trace.json.gz", calls=3)
    together = read_summary(tmp_path)
    apart = [read_summary(one), read_summary(two)]
    assert together.totals.calls == sum(s.totals.calls for s in apart) == 10
    assert np.array_equal(
        together.routers[0].assignments, sum(np.array(s.routers[0].assignments) for s in apart)
    )
    assert together.phases is not None and together.phases.total.calls == 10
    assert together.routers[0].latency.device_busy is not None
    assert len(together.files) == 2 and together.to_dataframe().shape[0] == 10
    code, out, _ = run("report", one, two, "--format", "json")
    assert code == 0 and [r["totals"]["calls"] for r in json.loads(out)] == [4, 6]


def test_html_is_not_overwritten(tmp_path: Path) -> None:
    path, page = write_tiny(tmp_path / "a.json"), tmp_path / "page.html"
    page.write_text("mine")
    code, _, err = run("report", path, "--html", page)
    assert code == 6 and "--force" in err and page.read_text() == "mine"
    assert run("report", path, "--html", page, "--force")[0] == 0 and "plotly" in page.read_text()


def test_resaved_by_another_tool(tmp_path: Path) -> None:
    """Sorted keys put our data before the events, and the offsets no longer fit."""
    path = write_tiny(tmp_path / "a.json")
    other = tmp_path / "b.json"
    other.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True, indent=3))
    a, b = read_summary(path), read_summary(other)
    assert a.routers == b.routers and a.phases == b.phases


# -- diff ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two runs with the same noise, and one whose experts of layer 1 take 30 % longer."""
    folder = tmp_path_factory.mktemp("diff")
    noise = np.random.default_rng(0).normal(1, 0.05, (3, 2, 30))

    def write(name: str, row: int, factor: float) -> Path:
        def stretch(layer: int, call: int, op: str) -> float:
            return float(noise[row, layer, call]) * (factor if layer == 1 and op == "aten::mm" else 1)

        return write_tiny(folder / name, calls=30, stretch=stretch)

    return write("a.json", 0, 1.0), write("b.json", 1, 1.0), write("c.json", 2, 1.3)


def changes(a: Path, b: Path) -> dict[tuple[str, str], Any]:
    found = json.loads(run("diff", a, b, "--format", "json")[1])["changes"]
    return {(c["site"], c["metric"]): c for c in found}


def test_noise_is_not_a_change(two_runs: tuple[Path, Path, Path]) -> None:
    a, b, _ = two_runs
    assert {c["verdict"] for c in changes(a, a).values()} == {"same"}
    assert "changed" not in {c["verdict"] for c in changes(a, b).values()}
    code, _, err = run("diff", a, b, "--fail-on", "experts_p50>+0.0001%", "--fail-on", "experts_p50<-0.0001%")
    assert (code, err) == (0, "")


def test_a_real_change_is_found(two_runs: tuple[Path, Path, Path]) -> None:
    a, _, c = two_runs
    found = changes(a, c)
    slower = found["L01", "experts_p50"]
    assert slower["verdict"] == "changed" and 0.15 < slower["relative"] < 0.35
    assert slower["low"] <= slower["difference"] <= slower["high"]
    assert found["L01", "experts_flops_p50"]["verdict"] == "changed"
    assert found["L00", "experts_p50"]["verdict"] == "noise"
    assert run("diff", a, c, "--fail-on", "L01:experts_p50>+10%")[0] == 1
    assert run("diff", a, c, "--fail-on", "L01:experts_p50>+60%")[0] == 0
    assert run("diff", a, c, "--fail-on", "L01:experts_p50<-10%")[0] == 0
    assert run("diff", c, a, "--fail-on", "L01:experts_p50<-10%")[0] == 1
    code, out, _ = run("diff", a, c)
    assert code == 0 and "changed" in out and max(map(len, out.splitlines()[2:])) <= 80


@pytest.mark.parametrize(("before", "after", "told"), [(0.5, 0.8, False), (0.25, 1.0, True)])
def test_without_kernels_a_change_of_time_has_a_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: float, after: float, told: bool
) -> None:
    """Runs of the same thing differ by so much on the host's clock, which two runs do not show."""
    events = tiny_trace.events

    def write(name: str, factor: float) -> Path:
        def on_host(*arguments: Any) -> list[dict[str, Any]]:
            found = [e for e in events(*arguments) if e["cat"] in ("user_annotation", "cpu_op")]
            return [e | {"dur": e["dur"] * (factor if e["name"] == "aten::mm" else 1)} for e in found]

        monkeypatch.setattr(tiny_trace, "events", on_host)
        return write_tiny(tmp_path / name, calls=20)

    a, b = write("a.json", before), write("b.json", after)
    found = changes(a, b)["all", "experts_p50"]
    assert (found["verdict"] == "changed") == told and found["low"] > 0 and found["floor"] == 0.3
    condition = ("--fail-on", "experts_p50>+5%")
    assert run("diff", a, b, *condition)[0] == told
    assert run("diff", a, b, *condition, "--host-floor", "0")[0] == 1
    assert (
        "Host clock (all times): a change is reported only where its whole interval lies beyond 12 %"
        in " ".join(run("diff", a, b, "--host-floor", "12")[1].split())
    )
    code, _, err = run("diff", a, b, "--host-floor", "-1")
    assert code == 2 and "--host-floor -1" in err


def test_few_calls_are_said_to_be_few(tmp_path: Path) -> None:
    a = write_tiny(tmp_path / "a.json", calls=2)
    b = write_tiny(tmp_path / "b.json", calls=2, stretch=lambda layer, call, op: 1.5)
    assert changes(a, b)["all", "experts_p50"]["verdict"] == "few calls"
    assert run("diff", a, b, "--fail-on", "experts_p50>+5%")[0] == 1


@pytest.mark.parametrize(
    "condition", ["nonsense", "speed>+5%", "host_p50=3", "all:host_p50>", "L99:host_p50>1%"]
)
def test_bad_conditions(two_runs: tuple[Path, Path, Path], condition: str) -> None:
    a, b, _ = two_runs
    code, _, err = run("diff", a, b, "--fail-on", condition)
    assert (code == 2 and "--fail-on" in err) or "unknown metric" in err


# -- check --------------------------------------------------------------------------------------------


def broken(path: Path, change: Any) -> dict[str, list[Any]]:
    trace = json.loads(path.read_text())
    change(trace)
    path.write_text(json.dumps(trace))
    code, out, _ = run("check", path, "--format", "json")
    [rules] = json.loads(out).values()
    assert code == (1 if any(rules.values()) else 0)
    return {rule: found for rule, found in rules.items() if found}


def band(trace: Any, ph: str) -> list[Any]:
    return [e for e in trace["traceEvents"] if e.get("pid") == 9_000_000 and e["ph"] == ph]


def move(trace: Any, ph: str, index: int, by: float) -> None:
    band(trace, ph)[index]["ts"] += by


def column(trace: Any, name: str) -> Any:
    return recording_in(trace)["samples"][name]


def drop_ranges(trace: Any, name: str) -> None:
    events = trace["traceEvents"]
    events[:] = [e for e in events if not (e["name"] == name and e["ph"] == "X")]


def put_in_a_graph(trace: dict[str, Any], span_us: list[float]) -> None:
    """Say of the first call that it was made by a graph which ran at another time."""
    for spans in column(trace, "placement")[0]:
        spans.append(span_us)


BREAKS = {
    "versions_known": lambda t: recording_in(t)["versions"].update(torch="new"),
    "samples_are_accounted_for": lambda t: recording_in(t)["lost"].update(samples_without_range=2),
    "ranges_are_accounted_for": lambda t: recording_in(t)["lost"].update(ranges_without_sample=1),
    "placements_are_ranges": lambda t: drop_ranges(t, "moe.experts/L01"),
    "assignments_add_up": lambda t: column(t, "skipped").__setitem__(0, 1),
    "counts_are_possible": lambda t: column(t, "padding_assignments").__setitem__(0, 99),
    "figures_are_in_range": lambda t: column(t, "router_entropy").__setitem__(0, 1.5),
    "counters_stand_in_ranges": lambda t: move(t, "C", 0, 0.5),
    "counters_return_to_zero": lambda t: band(t, "C")[11]["args"].update(value=3),
    "lanes_do_not_cross": lambda t: band(t, "X")[0].update(dur=500.0),
    "slices_are_the_calls": lambda t: move(t, "X", 0, -3.0),
    "times_are_inside_graphs": lambda t: put_in_a_graph(t, [0.0, 1.0]),
}


def test_a_sound_trace_keeps_its_promises(tmp_path: Path) -> None:
    code, out, _ = run("check", write_tiny(tmp_path / "a.json"), write_tiny(tmp_path / "b.json.gz"))
    lines = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert code == 0 and lines == ["ok"] * 2 * len(RULES)
    # The rules of what could not be joined are broken in test_reading_losses.py and test_reading_resync.py.
    assert set(BREAKS) < set(RULES)


@pytest.mark.parametrize("rule", sorted(BREAKS))
def test_each_rule_can_break(tmp_path: Path, rule: str) -> None:
    assert rule in broken(write_tiny(tmp_path / "a.json"), BREAKS[rule])


def test_real_traces_keep_their_promises() -> None:
    code, out, _ = run("check", H200)
    assert code == 0, out


# -- findings -----------------------------------------------------------------------------------------


def rules(path: Path) -> dict[str, Any]:
    return {f["rule"]: f for f in json.loads(run("report", path, "--format", "json")[1])["findings"]}


def test_findings_of_the_load(tmp_path: Path) -> None:
    def uneven(made: RoutingSample) -> RoutingSample:
        return replace(
            made, padding_assignments=40, confidence=0.01 if made.layer else 0.99, nonfinite_tokens=1
        )

    path = write_tiny(tmp_path / "a.json", counts=lambda layer, call: (0, 5, 190, 5), change=uneven)
    found = rules(path)
    assert found["hot_expert"]["value"] == pytest.approx(3.8)
    assert "expert 2 gets 3.8× its share" in found["hot_expert"]["sentence"]
    assert found["hot_expert"]["sites"] == ["L00", "L01"]
    assert "2 experts in 2 layers got no token" in found["dead_experts"]["sentence"]
    assert "L00 1 of 4 (0), L01 1 of 4 (0)" in found["dead_experts"]["sentence"]
    assert "20 % of assignments are padding (threshold 10 %)" in found["padding"]["sentence"]
    assert {"undecided_router", "collapsed_router", "nonfinite"} <= set(found)
    assert all(f["advice"] and f["sentence"] and "threshold" in f for f in found.values())


def test_findings_stay_silent_without_enough_data(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "a.json", calls=1, counts=lambda layer, call: (0, 0, 8, 0))
    assert not {"hot_expert", "dead_experts", "padding"} & set(rules(path))


def test_findings_of_the_time(tmp_path: Path) -> None:
    slow = {"aten::index": 20.0, "aten::linear": 0.1}
    found = rules(write_tiny(tmp_path / "a.json", stretch=lambda layer, call, op: slow.get(op, 0.5)))
    assert "moving_tokens" in found
    assert found["router_waits"]["value"] == pytest.approx(0.04)
    assert "device busy is 4 % of its span" in found["router_waits"]["sentence"]
    gaps = rules(write_tiny(tmp_path / "b.json", stretch=lambda layer, call, op: 0.1))
    assert gaps["launch_gaps"]["value"] > 0.5
    assert "uncounted_flops" in rules(H200 / "prefill_grouped_mm.pt.trace.json.gz")
    assert "uncounted_flops" not in rules(H200 / "prefill_eager.pt.trace.json.gz")


# -- what imbalance costs -----------------------------------------------------------------------------


def costs(tmp_path: Path, loads: list[tuple[int, ...]], cost_us: float, noise: float = 0.0) -> Any:
    """Layer 0's products take 20 µs at equal load and `cost_us` more per slot of excess."""
    rng = np.random.default_rng(1)

    def stretch(layer: int, call: int, op: str) -> float:
        load = np.array(loads[call])
        us = 20 + cost_us * (load.max() - load.mean()) + noise * rng.normal()
        return us / 20 if op == "aten::mm" else 1e-3

    path = write_tiny(
        tmp_path / "a.json", calls=len(loads), counts=lambda layer, call: loads[call], stretch=stretch
    )
    report = json.loads(run("report", path, "--format", "json")[1])
    return report["imbalance"][0]


def varied(n: int) -> list[tuple[int, ...]]:
    return [(4 + i % 5, 4, 4 - i % 5, 4) if i % 5 else (4, 4, 4, 4) for i in range(n)]


def test_a_known_cost_is_recovered(tmp_path: Path) -> None:
    found = costs(tmp_path, varied(20), cost_us=3.0)
    assert found["verdict"] == "costs"
    assert found["cost_us"] == pytest.approx(3.0 * 2.0, rel=0.01)  # the mean excess is 2 slots
    assert found["equal_load_us"] == pytest.approx(20, rel=0.01)
    noisy = costs(tmp_path, varied(40), cost_us=3.0, noise=2.0)
    assert noisy["verdict"] == "costs" and noisy["low_us"] < 6.0 < noisy["high_us"]


@pytest.mark.parametrize(
    ("loads", "cost", "noise", "verdict", "reason"),
    [
        (varied(7), 3.0, 0.0, "cannot tell", "7 forward calls a layer; a fit needs 8"),
        ([(8, 4, 2, 2)] * 12, 3.0, 0.0, "cannot tell", "the loads vary by 0 %"),
        ([(4, 4, 4, 4)] * 12, 3.0, 0.0, "cannot tell", "equal in every call"),
        ([(2 * n, n, n, 0) for n in range(2, 14)], 3.0, 0.0, "cannot tell", "number of tokens alone"),
        (varied(20), 0.0, 3.0, "no effect seen", ""),
        (varied(20), -1.0, 0.0, "cannot tell", "something else varies"),
    ],
)
def test_what_cannot_be_told_is_not_guessed(
    tmp_path: Path, loads: list[tuple[int, ...]], cost: float, noise: float, verdict: str, reason: str
) -> None:
    found = costs(tmp_path, loads, cost, noise)
    assert found["verdict"] == verdict and reason in found["reason"]
    assert (found["cost_us"] is None) == (verdict == "cannot tell")


# -- speed --------------------------------------------------------------------------------------------


def test_speed_by_hand(tmp_path: Path) -> None:
    report = json.loads(run("report", write_tiny(tmp_path / "a.json"), "--format", "json")[1])
    experts = report["speed"]["layers"][0]["experts"]
    assert experts["flops_per_s"] == pytest.approx(24_000 / 72e-6)
    # 4 experts hit x 500 weights, 8 slots of 8 numbers in and out, 2 bytes each, 3 calls
    assert experts["least_bytes"] == 3 * 2 * (4 * 500 + 2 * 8 * 8)
    assert experts["share_of_peak"] == pytest.approx(24_000 / 72e-6 / 989.4e12)
    assert experts["bound"] == "memory"


@pytest.mark.parametrize(
    ("devices", "dtype", "options", "flops", "bandwidth"),
    [
        (["NVIDIA H200"], "bfloat16", [], 989.4e12, 4.8e12),
        (["NVIDIA H200"], "float32", [], None, 4.8e12),
        (["NVIDIA A100-SXM4-80GB"], "float16", [], 312e12, 2.039e12),
        (["NVIDIA A10G"], "bfloat16", [], None, None),
        (["NVIDIA L4"], "bfloat16", [], 121e12, 0.3e12),
        (["NVIDIA H200", "NVIDIA L4"], "bfloat16", [], None, None),
        (["Brand New X1"], "bfloat16", ["--peak-tflops", "100", "--peak-gbps", "1000"], 100e12, 1e12),
        ([], None, [], None, None),
    ],
)
def test_peaks(
    tmp_path: Path, devices: list[str], dtype: str | None, options: list[str], flops: Any, bandwidth: Any
) -> None:
    path = write_tiny(tmp_path / "a.json", devices=devices, model={"name": "m", "dtype": dtype})
    speed = json.loads(run("report", path, "--format", "json", *options)[1])["speed"]
    assert speed["peak_flops_per_s"] == (pytest.approx(flops) if flops else None)
    assert speed["peak_bytes_per_s"] == (pytest.approx(bandwidth) if bandwidth else None)
    assert speed["experts"]["bound"] is None, "without the model's width there are no bytes to compare"

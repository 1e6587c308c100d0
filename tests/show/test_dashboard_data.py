"""Tests of the MoE tab's data and URL routes, without a browser."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from werkzeug.test import Client

from moe_trace.data.trace_json.events import Kind
from moe_trace.read.file.trace_file import read_trace
from moe_trace.read.reader import read_summary
from moe_trace.read.reduced.workers import reduce_trace
from moe_trace.read.time.step_timeline import add_up, find_lanes, join_pieces
from moe_trace.show.json import to_plain
from moe_trace.show.tensorboard import store as store_module
from moe_trace.show.tensorboard.catalog import Catalogs, find_catalog
from moe_trace.show.tensorboard.data import Dashboard
from moe_trace.show.tensorboard.overview import VIEW_OF_RULE, overview
from moe_trace.show.tensorboard.plugin import STATIC, VIEWS, MoEPlugin
from paths import DATA

H200 = DATA / "h200"
TRAIN, PREFILL = "train_grouped_mm.pt.trace.json.gz", "prefill_grouped_mm.pt.trace.json.gz"
STAGES = "prefill_decode_16_layers.pt.trace.json.gz"
EAGER = "prefill_eager.pt.trace.json.gz"
MIXED = "prefill_decode_16_layers.pt.trace.json.gz"
PAYLOAD_MAX = 2_000_000


@pytest.fixture
def logdir(tmp_path: Path) -> Path:
    for run, name in (("train", TRAIN), ("prefill", PREFILL), ("prefill/eager", EAGER)):
        folder = tmp_path / "logs" / run
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(H200 / name, folder)
    return tmp_path / "logs"


@pytest.fixture
def dashboard(logdir: Path) -> Dashboard:
    return Dashboard(Catalogs(str(logdir)))


@pytest.fixture
def client(logdir: Path) -> Client:
    return client_of(logdir)


def client_of(logdir: Path | str) -> Client:
    """All routes of the plugin, as TensorBoard mounts them."""
    plugin = MoEPlugin(SimpleNamespace(logdir=str(logdir)))  # type: ignore[arg-type]
    apps = plugin.get_plugin_apps()

    def serve(environ: dict[str, Any], start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        route = next((r for r in apps if r == path), "/static/*" if path.startswith("/static/") else None)
        assert route is not None, f"TensorBoard knows no such route: {path}"
        return apps[route](environ, start_response)

    return Client(serve)


TRACE = {"run": "train", "trace": TRAIN}


# -- which traces --------------------------------------------------------------------------------------


def test_runs_are_folders_and_traces_are_files(dashboard: Dashboard) -> None:
    runs = {run["run"]: [t["trace"] for t in run["traces"]] for run in dashboard.answer("runs", {})["runs"]}
    assert runs == {"prefill": [PREFILL], "prefill/eager": [EAGER], "train": [TRAIN]}


def test_unreadable_traces_are_listed_with_their_reason_and_hurt_nothing(logdir: Path) -> None:
    bad = logdir / "bad"
    bad.mkdir()
    (bad / "empty.pt.trace.json").write_bytes(b"")
    (bad / "foreign.pt.trace.json").write_text('{"traceEvents": []}')
    (bad / "half.pt.trace.json.gz").write_bytes((H200 / TRAIN).read_bytes()[:100_000])
    (bad / "notjson.pt.trace.json").write_text("hello")
    (bad / "notes.txt").write_text("no trace")
    dashboard = Dashboard(Catalogs(str(logdir)))
    names = ["empty", "foreign", "half", "notjson"]
    files = {n: f"{n}.pt.trace.json" + (".gz" if n == "half" else "") for n in names}
    states = {n: dashboard.answer("trace", {"run": "bad", "trace": files[n]}) for n in names}
    assert {n: s["state"] for n, s in states.items()} == dict.fromkeys(names, "broken")
    assert "empty file" in states["empty"]["reason"]
    assert "without moe_trace data" in states["foreign"]["reason"]
    assert "truncated" in states["half"]["reason"]
    assert str(logdir) not in "".join(s["reason"] for s in states.values()), "reasons name no folder twice"
    assert "broken" in dashboard.answer("overview", {"run": "bad", "trace": files["half"]})
    assert dashboard.answer("overview", TRACE)["facts"][0]["text"] == "OlmoeForCausalLM"


def test_a_trace_is_read_once_until_its_file_changes(logdir: Path) -> None:
    dashboard = Dashboard(Catalogs(str(logdir)))
    for view in ("overview", "routing", "time", "ranks"):
        dashboard.answer(view, TRACE)
    assert dashboard.store.reads == 1
    shutil.copy(H200 / PREFILL, logdir / "train" / TRAIN)
    assert dashboard.answer("overview", TRACE)["facts"][4]["value"] == 3, "the new file's steps"
    assert dashboard.store.reads == 2


def test_a_half_written_trace_is_read_again_when_it_has_grown(tmp_path: Path) -> None:
    whole = (H200 / TRAIN).read_bytes()
    (tmp_path / TRAIN).write_bytes(whole[:-1000])
    dashboard = Dashboard(Catalogs(str(tmp_path)))
    here = {"run": ".", "trace": TRAIN}
    assert dashboard.answer("trace", here)["state"] == "broken"
    (tmp_path / TRAIN).write_bytes(whole)
    assert dashboard.answer("trace", here)["state"] == "ok"


def test_memory_is_bounded(logdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SUMMARIES_MAX_BYTES", 1)
    dashboard = Dashboard(Catalogs(str(logdir)))
    dashboard.store = store_module.Store(max_bytes=1)
    for run, name in (("train", TRAIN), ("prefill", PREFILL), ("prefill/eager", EAGER)):
        dashboard.answer("overview", {"run": run, "trace": name})
        assert len(dashboard.store._kept) == 1
    dashboard.answer("overview", TRACE)
    assert dashboard.store.reads == 4


def test_what_was_asked_for_longest_ago_is_dropped_first(
    logdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_size_bytes", lambda summary: 1)
    dashboard = Dashboard(Catalogs(str(logdir)))
    dashboard.store = store_module.Store(max_bytes=2)
    first, second, third = (("train", TRAIN), ("prefill", PREFILL), ("prefill/eager", EAGER))
    for run, name in (first, second, first, third, first):
        dashboard.answer("overview", {"run": run, "trace": name})
    assert dashboard.store.reads == 3, "the second went when the third came"


def test_what_was_read_of_files_that_are_gone_is_dropped(logdir: Path) -> None:
    dashboard = Dashboard(Catalogs(str(logdir)))
    dashboard.answer("overview", TRACE)
    trace = dashboard.catalogs.find(TRACE["run"], TRACE["trace"])
    assert dashboard.store.known(trace) is not None
    (logdir / "train" / TRAIN).unlink()
    dashboard.answer("runs", {"fresh": "1"})
    assert dashboard.store.known(trace) is None


def test_a_new_run_appears(dashboard: Dashboard, logdir: Path) -> None:
    dashboard.answer("runs", {})
    (logdir / "later").mkdir()
    shutil.copy(H200 / TRAIN, logdir / "later")
    assert "later" in {r["run"] for r in dashboard.answer("runs", {"fresh": "1"})["runs"]}


def test_the_tab_finds_what_tensorboard_finds(logdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(logdir.parent))
    home = f"~/{logdir.name}"
    truth = [run["run"] for run in Dashboard(Catalogs(str(logdir))).answer("runs", {})["runs"]]
    assert [run["run"] for run in Dashboard(Catalogs(home)).answer("runs", {})["runs"]] == truth
    spec = Dashboard(Catalogs("", f"mine:{home},{logdir / 'train'}"))
    assert {run["run"] for run in spec.answer("runs", {})["runs"]} == {*(f"mine/{r}" for r in truth), "."}
    assert spec.answer("trace", {"run": "mine/train", "trace": TRAIN})["state"] == "ok"


def test_no_single_run_takes_the_tab_down(logdir: Path) -> None:
    odd = Path(os.fsdecode(bytes(logdir) + b"/\xff\xfe"))
    odd.mkdir()
    shutil.copy(H200 / TRAIN, odd)
    os.mkfifo(logdir / "train" / "pipe.pt.trace.json")
    dashboard = Dashboard(Catalogs(str(logdir)))
    runs = {run["run"]: run["traces"] for run in dashboard.answer("runs", {})["runs"]}
    json.dumps(runs).encode()
    assert dashboard.answer("trace", {"run": "\\xff\\xfe", "trace": TRAIN})["state"] == "ok"
    pipe = next(trace for trace in runs["train"] if trace["trace"].startswith("pipe"))
    assert pipe["state"] == "broken" and "no regular file" in pipe["reason"]


def test_a_lack_of_memory_is_forgotten(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **options: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(store_module, "analyse", fails)
        assert "memory" in dashboard.answer("overview", TRACE)["broken"]
    assert "broken" not in dashboard.answer("overview", TRACE)


def test_what_was_read_is_answered_while_another_trace_is_read(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard.answer("overview", TRACE)
    started, go_on = threading.Event(), threading.Event()

    def waits(*args: object, **options: object) -> None:
        started.set()
        go_on.wait(30)
        raise MemoryError

    monkeypatch.setattr(store_module, "analyse", waits)
    other = threading.Thread(target=dashboard.answer, args=("overview", {"run": "prefill", "trace": PREFILL}))
    other.start()
    assert started.wait(30)
    answered = threading.Thread(target=dashboard.answer, args=("overview", TRACE))
    answered.start()
    answered.join(20)
    still_waiting = answered.is_alive()
    go_on.set()
    other.join()
    assert not still_waiting


@pytest.fixture
def reduced(tmp_path: Path) -> Path:
    """Two ranks, each with what it was reduced to."""
    folder = tmp_path / "logs" / "ep2"
    shutil.copytree(DATA / "gloo_ep2", folder)
    for trace in folder.glob("*.json.gz"):
        reduce_trace(trace)
    return folder


def test_ranks_whose_traces_are_gone_are_shown_from_what_they_were_reduced_to(reduced: Path) -> None:
    logdir, name = reduced.parent, "rank0.pt.trace.json.gz"
    asked = {"run": "ep2", "trace": name}
    views = ("overview", "routing", "heat", "time", "ranks")

    def shown() -> tuple[list[Any], Dashboard]:
        dashboard = Dashboard(Catalogs(str(logdir)))
        (run,) = dashboard.answer("runs", {})["runs"]
        assert [t["trace"] for t in run["traces"]] == [name, "rank1.pt.trace.json.gz"]
        return [dashboard.answer(view, asked) for view in views], dashboard

    with_traces, _ = shown()
    for trace in reduced.glob("*.json.gz"):
        trace.unlink()
    without, dashboard = shown()
    assert without[1:] == with_traces[1:]
    assert without[0]["stages"] == with_traces[0]["stages"]
    assert any("gone" in note for note in without[0]["notes"])
    assert "the trace is gone" in dashboard.answer("timeline", asked)["broken"]
    gone = client_of(logdir).get(f"/download?run=ep2&trace={name}")
    assert gone.status_code == 404 and "gone" in gone.get_json()["error"]


def test_a_trace_is_read_by_the_small_file_of_just_its_bytes(reduced: Path) -> None:
    trace = reduced / "rank0.pt.trace.json.gz"
    asked = {"run": "ep2", "trace": trace.name}
    small = next(reduced.glob("rank0*.moe_trace"))
    small.write_bytes(next(reduced.glob("rank1*.moe_trace")).read_bytes())
    dashboard = Dashboard(Catalogs(str(reduced.parent)))
    assert dashboard.answer("trace", asked)["rank"] == 1, "the small file was read"
    trace.write_bytes(gzip.compress(gzip.decompress(trace.read_bytes()), 1))
    assert dashboard.answer("trace", asked)["rank"] == 0, "it is of other bytes now"
    trace.unlink()
    small.unlink()
    small.symlink_to(DATA / "gloo_ep2" / trace.name)
    refused = Dashboard(Catalogs(str(reduced.parent))).answer("runs", {})["runs"][0]["traces"]
    assert [t["state"] for t in refused if t["trace"] == trace.name] == ["broken"], (
        "a link that leaves the folder"
    )


def test_a_trace_that_is_deleted_between_two_requests_is_missed_alone(logdir: Path) -> None:
    client = client_of(logdir)
    client.get("/runs")
    (logdir / "train" / TRAIN).unlink()
    gone = client.get(f"/overview?run=train&trace={TRAIN}")
    assert gone.status_code == 404 and "reload the list of runs" in gone.get_json()["error"]
    assert client.get(f"/download?run=train&trace={TRAIN}").status_code == 404
    assert "facts" in client.get(f"/overview?run=prefill&trace={PREFILL}").get_json()
    assert client.get(f"/ranks?run=train&trace={TRAIN}").status_code == 200
    runs = client.get("/runs?fresh=1").get_json()["runs"]
    assert {run["run"] for run in runs} == {"prefill", "prefill/eager"}


def test_a_folder_that_is_deleted_leaves_an_empty_list(logdir: Path) -> None:
    client = client_of(logdir)
    assert client.get("/runs?fresh=1").get_json()["runs"]
    shutil.rmtree(logdir)
    assert client.get("/runs?fresh=1").get_json()["runs"] == []


SPECS = [
    "a:{d}/train,b:{d}/prefill",
    "{d}/train,{d}/prefill",
    "a:~/train",
    "a:{d}/one:two",
    "a b:{d}/one:two",
]


@pytest.mark.parametrize("spec", SPECS)
def test_parts_of_a_logdir_spec_are_tensorboards(
    spec: str, logdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingester = pytest.importorskip("tensorboard.backend.event_processing.data_ingester")
    monkeypatch.setenv("HOME", str(logdir))
    for name in ("one:two", "x:y"):
        (logdir / name).symlink_to("train")
    found = Catalogs("", spec.format(d=logdir)).get(0.0).traces
    roots = {str(trace.root): run.partition("/")[0] for (run, _), trace in found.items()}
    wanted = ingester._parse_event_files_spec(spec.format(d=logdir))
    assert {root: name if wanted[root] else None for root, name in roots.items()} == wanted
    flags = SimpleNamespace(logdir="", logdir_spec=spec.format(d=logdir))
    assert MoEPlugin(SimpleNamespace(logdir="", flags=flags)).is_active()  # type: ignore[arg-type]


def test_one_of_two_traces_of_one_name_is_not_hidden_silently(logdir: Path) -> None:
    shutil.copy(H200 / EAGER, logdir / "train" / PREFILL)
    runs = Dashboard(Catalogs("", f"{logdir / 'train'},{logdir / 'prefill'}")).answer("runs", {})["runs"]
    (run,) = (run for run in runs if run["run"] == ".")
    states = [(trace["state"], trace.get("reason")) for trace in run["traces"] if trace["trace"] == PREFILL]
    assert states[0] == ("unread", None)
    assert states[1][0] == "broken" and "name the folders" in states[1][1]


# -- security ------------------------------------------------------------------------------------------


def test_links_that_leave_the_log_folder_are_refused(logdir: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    shutil.copy(H200 / TRAIN, secret / TRAIN)
    (logdir / "file").mkdir()
    (logdir / "file" / "link.pt.trace.json.gz").symlink_to(secret / TRAIN)
    (logdir / "folder").symlink_to(secret)
    (logdir / "inside.pt.trace.json.gz").symlink_to(logdir / "train" / TRAIN)
    catalog = find_catalog(logdir)
    assert ("file", "link.pt.trace.json.gz") in catalog.refused
    assert (".", "folder/") in catalog.refused
    assert (".", "inside.pt.trace.json.gz") in catalog.traces
    client = client_of(logdir)
    for run, name in (("file", "link.pt.trace.json.gz"), ("folder", TRAIN)):
        query = urllib.parse.urlencode({"run": run, "trace": name})
        assert client.get(f"/download?{query}").status_code == 404
        assert client.get(f"/overview?{query}").status_code == 404


def test_a_file_that_becomes_a_link_after_it_was_listed_is_not_served(logdir: Path, tmp_path: Path) -> None:
    client = client_of(logdir)
    client.get("/runs")
    secret = tmp_path / "secret.json"
    secret.write_text("secret")
    (logdir / "train" / TRAIN).unlink()
    (logdir / "train" / TRAIN).symlink_to(secret)
    for view in ("download", "overview"):
        assert client.get(f"/{view}?run=train&trace={TRAIN}").data != b"secret"
    assert client.get(f"/download?run=train&trace={TRAIN}").status_code == 404


EVIL = [
    "../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/etc/passwd",
    "%252e%252e%252fetc%252fpasswd",
    "/etc/passwd",
    "//etc/passwd",
    "..\\..\\etc\\passwd",
    "....//....//etc/passwd",
    "train/../train",
    "./train",
    "train/",
    "passwd%00.pt.trace.json",
]


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize("view", ["download", "overview", "timeline"])
def test_no_path_leads_out(client: Client, logdir: Path, view: str, evil: str) -> None:
    (logdir.parent / "outside.pt.trace.json").write_text("{}")
    for query in (f"run={evil}&trace={TRAIN}", f"run=train&trace={evil}", f"run={evil}&trace=passwd"):
        answer = client.get(f"/{view}?{query}")
        assert answer.status_code == 404
        assert b"root:" not in answer.data


@pytest.mark.parametrize(
    "evil", [*EVIL, "../plugin.py", "..%2fplugin.py", "views/../../plugin.py", "", "views"]
)
def test_static_serves_its_own_files_only(client: Client, evil: str) -> None:
    answer = client.get(f"/static/{evil}")
    assert answer.status_code == 404
    assert client.get("/static/index.js").status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_only_get_is_answered(client: Client, method: str) -> None:
    for path in (*(f"/{view}" for view in VIEWS), "/download", "/static/index.js", "/plotly.min.js"):
        answer = client.open(path, method=method)
        assert answer.status_code == 405
        assert answer.headers["Allow"] == "GET"


def test_headers_satisfy_tensorboard(client: Client) -> None:
    query = f"run=train&trace={TRAIN}"
    for path in ("/runs", f"/overview?{query}", f"/download?{query}", "/static/style.css", "/plotly.min.js"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "html" not in answer.headers["Content-Type"]


def test_download_is_the_file_itself(client: Client) -> None:
    answer = client.get(f"/download?run=train&trace={TRAIN}")
    assert answer.data == (H200 / TRAIN).read_bytes()
    assert answer.headers["Content-Disposition"] == f'attachment; filename="{TRAIN}"'


@pytest.mark.parametrize("name", ["step", "from", "to", "start", "end"])
@pytest.mark.parametrize("value", ["x", "1e400", "nan", "9" * 30, "<b>", "-5"])
def test_odd_parameters_are_refused_or_harmless(client: Client, name: str, value: str) -> None:
    query = urllib.parse.urlencode({**TRACE, name: value, "site": "L00"})
    for view in ("heat", "layer", "timeline", "kernels"):
        answer = client.get(f"/{view}?{query}")
        assert answer.status_code in (200, 400)
        assert answer.headers["Content-Type"].startswith("application/json")


def test_the_page_has_no_inline_script_and_writes_no_html() -> None:
    for path in STATIC.rglob("*.js"):
        source = path.read_text(encoding="utf-8")
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
        ):
            assert word not in source, f"{path.name} uses {word}"
        assert "http://" not in source
        assert "https://" not in source


# -- figures -------------------------------------------------------------------------------------------


def test_findings_are_those_of_the_report_worst_first() -> None:
    summary = read_summary(H200 / PREFILL)
    shown = overview(summary)["stages"][0]["findings"]["shown"]
    assert [f["sentence"] for f in shown] == [f.sentence for f in summary.findings]
    costs = [f.cost_us for f in summary.findings if f.cost_us is not None]
    assert costs == sorted(costs, reverse=True) and len(costs) >= 1
    assert {f.rule for f in summary.findings} >= {"hot_expert", "dead_experts", "moving_tokens"}
    assert set(VIEW_OF_RULE.values()) == {"time"}


def test_three_tokens_are_not_called_even() -> None:
    """Whether a layer is uneven, nobody can say of them: that is no finding of evenness."""
    stages = overview(read_summary(DATA / "h100" / STAGES))["stages"]
    details = {s["stage"]: c["detail"] for s in stages for c in s["cards"] if c["label"].startswith("most")}
    assert details == {"prefill": "in L15", "decode": "too few tokens to say"}


def test_a_model_of_fewer_layers_is_another(logdir: Path) -> None:
    """Compare begins with a trace of the same model as A."""
    shutil.copy(DATA / "h100" / STAGES, logdir / "train")
    dashboard = Dashboard(Catalogs(str(logdir)))
    models = [
        dashboard.answer("trace", {"run": run, "trace": name})["model"]
        for run, name in (("train", TRAIN), ("prefill", PREFILL), ("train", STAGES))
    ]
    assert models[0] == models[1] != models[2] and models[2].endswith(", 16 routers")


def test_any_range_of_steps_adds_up(dashboard: Dashboard) -> None:
    query = {"run": "prefill", "trace": PREFILL}
    summary = read_summary(H200 / PREFILL)
    whole = dashboard.answer("heat", query)
    for router, row in zip(summary.routers, whole["z"], strict=True):
        counts = np.array(router.assignments)
        np.testing.assert_allclose(row, counts * len(counts) / counts.sum(), atol=1e-4)
    for position, step in enumerate(dashboard.answer("routing", query)["steps"]):
        one = dashboard.answer("heat", {**query, "from": str(position), "to": str(position)})
        for router, cells in zip(summary.routers, one["table"]["rows"], strict=True):
            mine = [s for s in summary.samples if s.step == step and s.name == router.info.name]
            assert cells[1][1] == sum(int(s.assignments.sum()) for s in mine)
            few = cells[1][1] < 20 * len(router.assignments)
            assert (cells[-1] == "-") == few, "so few assignments tell of no dead expert"


def test_kernels_of_a_step_are_those_of_the_report(dashboard: Dashboard) -> None:
    for path in (H200 / TRAIN, H200 / EAGER):
        summary = read_summary(path)
        lanes = find_lanes(summary.samples, read_trace(path).events)
        assert summary.phases is not None
        total_us = sum(work.total_us for work in add_up(lanes.device, lanes))
        assert total_us == pytest.approx(summary.phases.total.device_busy_us, rel=1e-12)
        host_us = sum(work.total_us for work in add_up(lanes.host, lanes))
        block, gap = summary.phases.total.block_host_us, summary.phases.total.host_gap_us
        assert host_us == pytest.approx(block - gap, rel=1e-12)


def test_kernels_of_a_range_equal_a_count_by_hand(dashboard: Dashboard) -> None:
    events = json.loads(gzip.decompress((H200 / TRAIN).read_bytes()))["traceEvents"]
    here = dashboard.answer("kernels", {**TRACE, "step": "1", "start": "100", "end": "900"})
    step = dashboard.answer("timeline", {**TRACE, "step": "1"})
    kernels = {
        (e["ts"], e["dur"], e["name"])
        for e in events
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    }
    summary = read_summary(H200 / TRAIN)
    lanes = find_lanes(summary.samples, read_trace(H200 / TRAIN).events)
    mine = lanes.of_step(1, "device")
    origin_us = mine.start_ns.min() / 1000
    assert step["length_us"] == pytest.approx((mine.end_ns.max() - mine.start_ns.min()) / 1000)
    spans = [s.placement.device["block"] for s in summary.samples if s.step == 1 and s.placement]
    inside = [
        (ts, dur, name)
        for ts, dur, name in kernels
        if ts + dur >= origin_us + 100 - 1e-6
        and ts <= origin_us + 900 + 1e-6
        and any(span.start_us - 1e-6 <= ts and ts + dur <= span.end_us + 1e-6 for span in spans)
    ]
    assert here["count"] == len(inside) > 5
    assert here["total_us"] == pytest.approx(sum(dur for _, dur, _ in inside))
    for _name, _phase, _layers, count, total, mean, share in here["table"]["rows"]:
        assert mean[1] * count[1] == pytest.approx(total[1])
        assert share[1] * here["total_us"] == pytest.approx(total[1])


def test_joined_stretches_lose_no_piece() -> None:
    summary = read_summary(H200 / EAGER)
    lanes = find_lanes(summary.samples, read_trace(H200 / EAGER).events)
    apart = join_pieces(lanes.device, 0)
    together = join_pieces(lanes.device, 10**9)
    assert apart.pieces.sum() == together.pieces.sum() == len(lanes.device.block)
    assert len(together.block) == len(set(zip(lanes.device.block, lanes.device.phase, strict=True)))
    assert len(apart.block) > len(together.block)
    assert together.start_ns.min() == apart.start_ns.min()
    assert together.end_ns.max() == apart.end_ns.max()


def test_every_view_is_small_and_valid_json(client: Client) -> None:
    query = urllib.parse.urlencode({**TRACE, "site": "L01", "run_b": "prefill", "trace_b": PREFILL})
    for view in VIEWS:
        answer = client.get(f"/{view}?{query}")
        assert answer.status_code == 200, view
        assert len(answer.data) < PAYLOAD_MAX
        content = json.loads(answer.data, parse_constant=pytest.fail)
        assert "broken" not in content
        assert "error" not in content


def test_overview_numbers_stand_in_the_report(dashboard: Dashboard) -> None:
    plain = to_plain(read_summary(H200 / TRAIN))
    answer = dashboard.answer("overview", TRACE)
    with_path = [n for n in (*answer["stages"][0]["cards"], *answer["facts"]) if n.get("path")]
    assert len(with_path) == 10
    for number in with_path:
        value: Any = plain
        for part in number["path"].split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        assert number["value"] == value, number["path"]


@pytest.fixture
def mixed(tmp_path: Path) -> Dashboard:
    """A trace of a prefill and three decode steps."""
    shutil.copy(DATA / "h100" / MIXED, tmp_path)
    return Dashboard(Catalogs(str(tmp_path)))


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_view_shows_one_stage(mixed: Dashboard, stage: str) -> None:
    one = {"run": ".", "trace": MIXED, "stage": stage}
    part = read_summary(DATA / "h100" / MIXED).by_stage()[stage]  # type: ignore[index]
    routing = mixed.answer("routing", one)
    assert routing["steps"] == sorted({s.step for s in part.samples})
    assert [row[1][1] for row in routing["map"]["table"]["rows"]] == [r.tokens for r in part.routers]
    layer = mixed.answer("layer", {**one, "site": "L03"})
    plain = to_plain(read_summary(DATA / "h100" / MIXED))
    for fact in layer["facts"]:
        value: Any = plain
        for name in fact["path"].split("."):
            value = value[int(name)] if isinstance(value, list) else value[name]
        assert fact["value"] == value, fact["path"]
    assert mixed.answer("timeline", one)["steps"] == routing["steps"]
    assert mixed.answer("time", one)["figures"]["latency"]["table"]["rows"][0][1][1] == part.routers[0].calls


def test_without_a_choice_the_first_stage_is_shown_and_the_overview_shows_all(mixed: Dashboard) -> None:
    one = {"run": ".", "trace": MIXED}
    for stage in ("", "train", "nonsense"):
        assert mixed.answer("routing", {**one, "stage": stage}) == mixed.answer(
            "routing", one | {"stage": "prefill"}
        )
    answer = mixed.answer("overview", one)
    assert [part["stage"] for part in answer["stages"]] == ["prefill", "decode"]
    plain = to_plain(read_summary(DATA / "h100" / MIXED))
    for part in answer["stages"]:
        shares = [c for c in part["cards"] if (c["path"] or "").endswith("moe_share_of_model")]
        assert shares[0]["value"] == plain["stages"][part["stage"]]["phases"]["whole"]["moe_share_of_model"]
    assert mixed.answer("trace", one)["stages"] == ["prefill", "decode"]


# -- TensorBoard round it ------------------------------------------------------------------------------


def test_the_plugin_loads_without_torch_numpy_and_the_rest() -> None:
    """A package that is missing must not end the user's TensorBoard; the tab says what is missing."""
    script = """
import sys
for name in ("torch", "numpy", "msgspec", "plotly", "transformers"):
    sys.modules[name] = None
import moe_trace.show.tensorboard.plugin as module
from types import SimpleNamespace
from werkzeug.test import Client
plugin = module.MoEPlugin(SimpleNamespace(logdir=sys.argv[1]))
assert plugin.is_active()
apps = plugin.get_plugin_apps()
answer = Client(apps["/runs"]).get("/runs")
assert answer.status_code == 200 and "missing" in answer.json["error"], answer.data
"""
    done = subprocess.run([sys.executable, "-c", script, str(H200)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_reading_for_the_tab_loads_no_torch() -> None:
    script = """
import sys
from moe_trace.show.tensorboard.catalog import Catalogs
from moe_trace.show.tensorboard.data import Dashboard
answer = Dashboard(Catalogs(sys.argv[1])).answer("overview", {"run": ".", "trace": sys.argv[2]})
assert answer["stages"][0]["cards"], answer
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script, str(H200), TRAIN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("logdir_given", ["", "gs://bucket/logs", "no/such/folder"])
def test_without_a_local_folder_the_tab_is_inactive_and_says_so(logdir_given: str) -> None:
    plugin = MoEPlugin(SimpleNamespace(logdir=logdir_given))  # type: ignore[arg-type]
    assert not plugin.is_active()
    answer = client_of(logdir_given).get("/runs").json
    assert answer is not None
    assert answer["runs"] == []


def test_a_missing_plotly_is_said(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_trace.show.tensorboard.plugin.find_spec", lambda name: None)
    answer = client.get("/plotly.min.js")
    assert answer.status_code == 404
    assert b"pip install" in answer.data


def test_a_fault_of_ours_is_an_answer(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("by hand")

    monkeypatch.setattr(Dashboard, "answer", fail)
    answer = client.get("/overview")
    assert answer.status_code == 500
    assert "by hand" in json.loads(answer.data)["error"]


def test_lanes_have_no_device_without_kernels() -> None:
    """A CPU trace, made from the H200 one by leaving its kernels out."""
    trace = read_trace(H200 / TRAIN)
    events = trace.events.select(trace.events.kind != Kind.DEVICE)
    lanes = find_lanes(trace.recording.samples, events)
    assert lanes.clocks() == ("host",)
    assert len(lanes.host.block) > 0

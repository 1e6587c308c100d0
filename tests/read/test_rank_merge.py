"""Tests of `moe-trace merge`: one trace of all ranks, accepted by every reader, atomic and reproducible."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_trace.cli import main
from moe_trace.data.errors import OutputError, SchemaError, TraceFileError, UsageError
from moe_trace.data.schema import BAND_PID
from moe_trace.data.trace_json import cursor as stream_module
from moe_trace.read.check import check, read_checked
from moe_trace.read.ranks.merge_plan import plan_merge
from moe_trace.read.ranks.merged_file import write_merged
from moe_trace.read.ranks.renumber import Pids, Renamer, is_band
from moe_trace.read.reader import TraceSummary, read_recording, read_summary
from moe_trace.show.json import to_plain
from moe_trace.show.tensorboard.catalog import Catalogs
from moe_trace.show.tensorboard.data import Dashboard
from moe_trace.show.tensorboard.ranks import ranks, run_report
from moe_trace.timeline.merge import merge_recording
from paths import DATA
from spliced import recording_in
from tiny_ranks import Run, write_rank, write_ranks
from tiny_trace import write_tiny

H200 = DATA / "h200"


def merge(paths: list[Path] | list[str], out: Path) -> Path:
    write_merged(plan_merge(paths, out), out)
    return out


@pytest.fixture(scope="module", params=[2, 4])
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of the ranks, the merged trace)"""
    folder = tmp_path_factory.mktemp("ranks")
    write_ranks(folder, Run(ranks=request.param))
    out = tmp_path_factory.mktemp("merged") / "all.pt.trace.json"
    return folder, merge([folder], out)


def events_of(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    return list(json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"])


# -- what is in it ---------------------------------------------------------------------------------------


def test_every_event_is_there_once_at_its_true_time(merged: tuple[Path, Path]) -> None:
    folder, out = merged
    run = Run()
    expected: Counter[Any] = Counter()
    for rank, path in enumerate(sorted(folder.glob("rank*"))):
        # Counted from the earliest base, in nanoseconds: what `tiny_ranks` moved away, moved back.
        shift = run.base_ns[rank] - min(run.base_ns[: len(list(folder.glob("rank*")))])
        shift += round(1000 * run.offset_us[rank])
        for event in events_of(path):
            expected[event["ph"], event["name"], round(1000 * event["ts"]) + shift, event.get("dur")] += 1
    found: Counter[Any] = Counter()
    for event in events_of(out):
        found[event["ph"], event["name"], round(1000 * event["ts"]), event.get("dur")] += 1
    assert found == expected


def test_the_kernels_of_a_collective_end_together(merged: tuple[Path, Path]) -> None:
    ends: defaultdict[Any, set[float]] = defaultdict(set)
    for event in events_of(merged[1]):
        if event["name"] == "ncclDevKernel_SendRecv":
            ends[event["pid"]].add(round(1000 * (event["ts"] + event["dur"])))
    assert len(ends) == len(list(merged[0].glob("rank*")))
    assert len(set(map(frozenset, ends.values()))) == 1


def test_processes_and_ids_belong_to_one_rank(merged: tuple[Path, Path]) -> None:
    names: dict[Any, str] = {}
    ranks_of: defaultdict[Any, set[str]] = defaultdict(set)
    events = events_of(merged[1])
    for event in events:
        if event["ph"] == "M" and event["name"] == "process_name" and not is_band(event["pid"]):
            names[event["pid"]] = event["args"]["name"].rsplit(" ", 1)[0]
    count = len(list(merged[0].glob("rank*")))
    assert sorted(names.values()) == sorted([f"rank {r}" for r in range(count)] * 2)  # its CPU and its GPU
    for event in events:
        arguments = event.get("args") or {}
        for key, value in (
            ("id", event.get("id")),
            *((k, arguments.get(k)) for k in ("correlation", "External id")),
        ):
            if value is not None:
                ranks_of[key, value].add(names[event["pid"]])
    assert ranks_of and all(len(ranks) == 1 for ranks in ranks_of.values())


def test_arrows_join_what_they_joined(merged: tuple[Path, Path]) -> None:
    """Each arrow still leads from a launch to the kernel with that correlation, of the same rank."""
    slices = {(e["pid"], e["tid"], e["ts"]): e for e in events_of(merged[1]) if e["ph"] == "X"}
    ends = defaultdict(dict)
    for event in events_of(merged[1]):
        if event.get("cat") == "ac2g":
            ends[event["id"]][event["ph"]] = slices[event["pid"], event["tid"], event["ts"]]
    assert ends
    for pair in ends.values():
        assert pair["s"]["args"]["correlation"] == pair["f"]["args"]["correlation"]


def test_bands_stand_above_and_ranks_one_under_the_other(merged: tuple[Path, Path]) -> None:
    order: dict[int, int] = {}
    bands, labels = {}, {}
    for event in events_of(merged[1]):
        if event["ph"] == "M" and event["name"] == "process_sort_index":
            order[event["pid"]] = event["args"]["sort_index"]
        if event["ph"] == "M" and event["name"] == "process_labels":
            labels[event["pid"]] = event["args"]["labels"]
    ranks = len(list(merged[0].glob("rank*")))
    bands = {pid for pid in order if is_band(pid)}
    assert bands == {BAND_PID + rank for rank in range(ranks)}
    ordered = [labels[pid] for pid in sorted(order, key=order.__getitem__)]
    assert ordered[:ranks] == [f"rank {rank}" for rank in range(ranks)]
    assert ordered[ranks:] == [f"rank {r} {what}" for r in range(ranks) for what in ("CPU", "GPU 0")]


# -- who reads it ----------------------------------------------------------------------------------------


def without_paths(summary: TraceSummary) -> dict[str, Any]:
    plain = to_plain(summary)
    for key in ("trace", "files"):
        plain.pop(key)
    return plain


def test_it_says_what_the_folder_says(merged: tuple[Path, Path]) -> None:
    folder, out = merged
    assert without_paths(read_summary(out)) == without_paths(read_summary(folder))


def test_it_keeps_its_promises(merged: tuple[Path, Path]) -> None:
    assert [found for rules in check(read_checked(merged[1])).values() for found in rules] == []


def test_check_finds_a_slice_of_one_rank_that_is_gone(tmp_path: Path, merged: tuple[Path, Path]) -> None:
    trace = json.loads(merged[1].read_bytes())
    trace["traceEvents"] = [
        e for e in trace["traceEvents"] if not (e["ph"] == "X" and e["pid"] == BAND_PID + 1)
    ]
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(trace))
    assert check(read_checked(path))["slices_are_the_calls"]


def test_the_recording_is_found_without_reading_the_events(merged: tuple[Path, Path]) -> None:
    folder, out = merged
    whole = sum(len(read_recording(path).samples) for path in folder.glob("rank*"))
    recording = read_recording(out)
    assert len(recording.samples) == whole
    assert len({(s.name, s.call) for s in recording.samples}) == whole
    damaged = out.with_name("damaged.json")
    data = out.read_bytes()
    at = data.index(b'"traceEvents": [') + 20
    damaged.write_bytes(data[:at] + b"x" * 100 + data[at + 100 :])
    assert read_recording(damaged).samples, "only the end of the file was read"
    damaged.unlink()


def test_a_merged_trace_beside_its_ranks_is_not_counted_twice(tmp_path: Path) -> None:
    write_ranks(tmp_path, Run())
    alone = read_summary(tmp_path)
    merge([tmp_path], tmp_path / "all.pt.trace.json")
    both = read_summary(tmp_path)
    assert both.totals == alone.totals
    assert any("all.pt.trace.json was left out" in note for note in both.notes)
    assert main(["merge", str(tmp_path), "--out", str(tmp_path / "again.pt.trace.json")]) == 0


def test_the_dashboard_shows_it(merged: tuple[Path, Path]) -> None:
    board = Dashboard(Catalogs(str(merged[1].parent)))
    for view in ("overview", "routing", "time", "timeline", "kernels", "ranks"):
        answer = board.answer(view, {"run": ".", "trace": merged[1].name})
        assert "broken" not in answer, (view, answer)
    folder = Dashboard(Catalogs(str(merged[0])))
    one, apart = board.answer("ranks", {"run": "."}), folder.answer("ranks", {"run": "."})
    assert one["ranks"] == apart["ranks"] == len(list(merged[0].glob("rank*")))
    assert one["together"] == apart["together"]
    assert list(one["together"]["figures"]) == ["rank-sent", "rank-share", "rank-exchange", "rank-balance"]


def test_a_rank_that_waits_is_no_straggler(tmp_path: Path) -> None:
    """NCCL's kernels run while they wait: rank 0 waits longest, so its kernels are the longest of all."""
    write_ranks(tmp_path, Run(ranks=4))
    answer = Dashboard(Catalogs(str(tmp_path))).answer("ranks", {"run": "."})
    assert answer["without_waits"]
    rows = answer["figures"]["rank-work"]["table"]["rows"]
    work = [row[1][1] for row in rows]
    # A call: the kernels of `tiny_trace` take 40 µs, counts 2, dispatch 6, combine 13 once all have come. Two
    # layers, three calls.
    assert work == pytest.approx([6 * (40 + 2 + 6 + 13)] * 4)
    assert answer["straggler"]["ratio"] == pytest.approx(1)


def test_waits_that_cannot_be_taken_out_name_no_straggler(tmp_path: Path) -> None:
    write_ranks(tmp_path, Run())
    summaries = [read_summary(path) for path in sorted(tmp_path.iterdir())]
    report = run_report(summaries)
    assert report is not None
    on_host = replace(report, exchanges=tuple(replace(one, on_device=False) for one in report.exchanges))
    answer = ranks(summaries, on_host)
    assert (answer["straggler"], answer["waits_inside"]) == (None, True)


def test_hta_finds_the_kernels_of_both_ranks(tmp_path: Path) -> None:
    """On real H200 kernels: each rank's work is there once, beside the other's."""
    pytest.importorskip("hta")
    from hta.trace_analysis import TraceAnalysis

    paths = [as_rank(tmp_path, rank) for rank in (0, 1)]
    (tmp_path / "both").mkdir()
    merge(paths, tmp_path / "both" / "trace.json.gz")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "trace.json.gz").write_bytes(gzip.compress(paths[0].read_bytes()))
    one, both = (TraceAnalysis(trace_dir=str(tmp_path / name)) for name in ("one", "both"))
    single, double = (a.get_gpu_kernel_breakdown(visualize=False)[1] for a in (one, both))
    assert len(single) > 3
    counts = ("name", "kernel_type", "sum (us)")
    for (_, a), (_, b) in zip(single.iterrows(), double.iterrows(), strict=True):
        assert (a[counts[0]], a[counts[1]]) == (b[counts[0]], b[counts[1]])
        assert b[counts[2]] == pytest.approx(2 * a[counts[2]])


def as_rank(folder: Path, rank: int) -> Path:
    """A recorded trace of one GPU as that of a rank."""
    text = gzip.decompress((H200 / "prefill_grouped_mm.pt.trace.json.gz").read_bytes())
    trace = json.loads(text)
    recording_in(trace).update(rank=rank, world_size=2)
    path = folder / f"rank{rank}.pt.trace.json"
    path.write_text(json.dumps({"distributedInfo": {"rank": rank}, **trace}))
    return path


# -- how it is written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_the_same_ranks_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    paths = write_ranks(tmp_path / "in", Run(suffix=".pt.trace" + suffix))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = merge(paths, tmp_path / "a" / f"all{suffix}")
    two = merge(list(reversed(paths)), tmp_path / "b" / f"all{suffix}")
    assert one.read_bytes() == two.read_bytes()


def test_blocks_of_any_size_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_ranks(tmp_path / "in", Run())
    whole = merge(paths, tmp_path / "all.json").read_bytes()
    monkeypatch.setattr(stream_module, "BLOCK_BYTES", 700)
    assert merge(paths, tmp_path / "all.json").read_bytes() == whole


def test_a_failure_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_ranks(tmp_path / "in", Run())
    out = tmp_path / "all.json"
    plan = plan_merge(paths, out)
    paths[1].write_bytes(paths[1].read_bytes()[:4000])  # it changed after it was planned
    with pytest.raises(TraceFileError, match="truncated"):
        write_merged(plan, out)
    assert list(tmp_path.iterdir()) == [tmp_path / "in"]
    out.write_text("precious")
    with pytest.raises(TraceFileError):
        write_merged(plan, out)
    assert out.read_text() == "precious"


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    paths = write_ranks(tmp_path / "in", Run())
    with pytest.raises(OutputError, match="cannot be written"):
        write_merged(plan_merge(paths, Path("/dev/full")), Path("/dev/full"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ranks(tmp_path / "in", Run())
    out = tmp_path / "all.json.gz"
    assert main(["merge", str(tmp_path / "in"), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "ranks 0, 1 on one clock" in printed.out
    assert "rank 1 +250.000 µs" in printed.out and "(the residual)" in printed.out
    assert printed.err == ""
    assert main(["merge", str(tmp_path / "in"), "--out", str(out)]) == OutputError.exit_code
    assert "--force" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "in"), "--out", str(out), "--force"]) == 0
    assert main(["merge", str(tmp_path / "in"), "--out", str(tmp_path / "all.txt")]) == UsageError.exit_code


# -- what is refused, what is left out -------------------------------------------------------------------


def test_the_same_rank_twice_is_refused(tmp_path: Path) -> None:
    paths = write_ranks(tmp_path, Run())
    copy = tmp_path / "copy.pt.trace.json"
    copy.write_bytes(paths[1].read_bytes())
    with pytest.raises(UsageError, match=r"rank 1 twice, in .*copy.* and .*rank1"):
        plan_merge([tmp_path], tmp_path / "out.json")


def test_different_models_are_refused(tmp_path: Path) -> None:
    write_rank(tmp_path, Run(), 0)
    write_rank(tmp_path, Run(model={**Run().model, "num_layers": 3}), 1)
    with pytest.raises(TraceFileError, match=r"different models: num_layers 2 and 3"):
        plan_merge([tmp_path], tmp_path / "out.json")


def test_runs_of_different_sizes_are_refused(tmp_path: Path) -> None:
    write_rank(tmp_path, Run(), 0)
    write_rank(tmp_path, Run(world_size=3), 1)
    with pytest.raises(TraceFileError, match="2 and 3 ranks"):
        plan_merge([tmp_path], tmp_path / "out.json")


def test_ranks_of_different_runs_are_refused(tmp_path: Path) -> None:
    write_rank(tmp_path, Run(), 0)
    write_rank(tmp_path, Run(exchange="all_reduce"), 1)
    expected = r"rank 0 \(ep 2\) shares tokens with ranks \[0\], rank 1 \(ep 2\) with \[0, 1\]"
    with pytest.raises(TraceFileError, match=expected):
        plan_merge([tmp_path], tmp_path / "out.json")
    with pytest.raises(TraceFileError, match=expected):
        read_summary(tmp_path)


def test_one_rank_beside_a_truncated_one_names_that(tmp_path: Path) -> None:
    paths = write_ranks(tmp_path, Run())
    paths[1].write_bytes(paths[1].read_bytes()[:9000])
    with pytest.raises(UsageError, match=r"(?s)found 1 trace of one rank.*rank1.pt.trace.json was left out"):
        plan_merge([tmp_path], tmp_path / "out.json")


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    paths = write_ranks(tmp_path, Run())
    paths[1].write_bytes(paths[1].read_bytes().replace(b'"schema_version":1', b'"schema_version":2'))
    with pytest.raises(SchemaError, match="schema version 2, expected 1"):
        plan_merge(paths, tmp_path / "out.json")


def test_one_rank_is_refused(tmp_path: Path) -> None:
    (path,) = write_ranks(tmp_path, Run(), ranks=(0,))
    with pytest.raises(UsageError, match="expected those of two ranks"):
        plan_merge([path], tmp_path / "out.json")


def test_a_merged_trace_is_refused(tmp_path: Path) -> None:
    paths = write_ranks(tmp_path / "in", Run())
    out = merge(paths, tmp_path / "all.json")
    with pytest.raises(UsageError, match="holds several ranks already"):
        plan_merge([out, *paths], tmp_path / "again.json")


def test_samples_cannot_be_merged_into_several_ranks(tmp_path: Path) -> None:
    paths = write_ranks(tmp_path / "in", Run())
    out = merge(paths, tmp_path / "all.json")
    before = out.read_bytes()
    with pytest.raises(TraceFileError, match="merged trace of several ranks"):
        merge_recording(out, [read_recording(paths[0])])
    assert out.read_bytes() == before


def test_missing_ranks_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ranks(tmp_path / "in", Run(ranks=4), ranks=(0, 1, 3))
    out = tmp_path / "all.json"
    assert main(["merge", str(tmp_path / "in"), "--out", str(out)]) == 0
    assert "world_size is 4, but 3 ranks were found; no trace of rank 2" in capsys.readouterr().err
    report = read_summary(out).ranks
    assert report is not None
    assert (report.ranks, report.missing) == ((0, 1, 3), (2,))


def test_many_missing_ranks_are_a_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ranks(tmp_path / "in", Run(world_size=300))
    assert main(["merge", str(tmp_path / "in"), "--out", str(tmp_path / "all.json")]) == 0
    assert "no trace of rank 2-299\n" in capsys.readouterr().err
    assert any("(rank 2-299)" in note for note in read_summary(tmp_path / "in").notes)


def test_a_truncated_rank_is_named_and_the_others_are_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_ranks(tmp_path / "in", Run(ranks=4))
    paths[2].write_bytes(paths[2].read_bytes()[:9000])
    out = tmp_path / "all.json"
    assert main(["merge", str(tmp_path / "in"), "--out", str(out)]) == 0
    errors = capsys.readouterr().err
    assert (
        "rank2.pt.trace.json was left out" in errors
        and "truncated" in errors
        and "no trace of rank 2" in errors
    )
    summary = read_summary(out)
    assert any(
        "rank2.pt.trace.json was left out when the ranks were merged" in note for note in summary.notes
    )
    assert summary.ranks is not None and summary.ranks.ranks == (0, 1, 3)


def test_only_broken_ranks_are_an_error(tmp_path: Path) -> None:
    for path in write_ranks(tmp_path, Run()):
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(TraceFileError, match="truncated"):
        plan_merge([tmp_path], tmp_path / "out.json")


COMM = '{"ph": "X", "name": "record_param_comms", "cat": "cpu_op", "pid": 7, "tid": 7, "ts": 1, "dur": 1, '
ODD_EVENTS = (
    '{"ph": "X", "name": "odd", "pid": null, "tid": 1, "ts": NaN, "dur": 1}',
    '{"ph": "X", "name": "big", "pid": 7, "ts": 1e400, "id": 99999999999999999999999, "args": {"n": -1e999}}',
    '{"ph": "M", "name": "process_name", "pid": "Spans", "args": null}',
    '{"ph": "M", "name": "process_sort_index", "pid": 1.5, "args": {"sort_index": "x"}}',
    '{"ph": "s", "id": "0xff", "pid": -1, "ts": "soon", "args": {"correlation": {"a": 1}}}',
    '{"name": "lone \\ud800 surrogate", "pid": true}',
    COMM + '"args": {"Collective name": ["all_to_all"], "In split size": {"a": 1}, "Group size": -4, '
    '"Process Group Ranks": "[0, ..., 9]", "Global rank start": 1e300, "dtype": 7}}',
    COMM + '"args": {"Collective name": "all_to_allv", "In split size": "[9223372036854775807, -1]", '
    '"In msg nelems": 1e9, "Process Group Ranks": "[0, 0]", "Group size": 99999999999}}',
)


@pytest.mark.parametrize("event", ODD_EVENTS)
def test_odd_events_do_no_harm(tmp_path: Path, event: str) -> None:
    paths = write_ranks(tmp_path / "in", Run())
    data = paths[1].read_bytes()
    start = data.index(b'"traceEvents": [') + len(b'"traceEvents": [')
    paths[1].write_bytes(data[:start] + event.encode() + b", " + data[start:])
    out = merge(paths, tmp_path / "all.json")
    report = read_summary(out).ranks
    assert report is not None
    assert report.alignment.offset_ns[1] == 250_000
    assert report.bytes_check.different == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parts", []),
        ("parts", None),
        ("alignment", {"reference": "x"}),
        ("missing", {"a": 1}),
    ],
)
def test_changed_data_of_ranks_is_refused_in_words(tmp_path: Path, key: str, value: Any) -> None:
    out = merge(write_ranks(tmp_path / "in", Run()), tmp_path / "all.json")
    trace = json.loads(out.read_bytes())
    recording_in(trace)["ranks"][key] = value
    out.write_text(json.dumps(trace))
    with pytest.raises(TraceFileError, match="was changed after it was written"):
        read_summary(out)


def test_parts_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    out = merge(write_ranks(tmp_path / "in", Run()), tmp_path / "all.json")
    trace = json.loads(out.read_bytes())
    recording_in(trace)["ranks"]["parts"][0]["samples"] += 1
    out.write_text(json.dumps(trace))
    with pytest.raises(TraceFileError, match="13 calls of 2 merged ranks, but 12 in all"):
        read_summary(out)


def test_a_single_run_beside_it_is_still_one_trace(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.json")
    with pytest.raises(UsageError):
        plan_merge([path], tmp_path / "out.json")


# -- names and ids ---------------------------------------------------------------------------------------


def test_a_process_keeps_its_id_unless_another_rank_has_it() -> None:
    pids = Pids()
    assert [pids.of(0, 7), pids.of(0, 0), pids.of(0, "Spans")] == [7, 0, "Spans"]
    assert [pids.of(1, 8), pids.of(1, 0), pids.of(1, "Spans")] == [8, 2**22, "Spans (rank 1)"]
    assert pids.of(2, 0) == 2**22 + 1
    assert pids.of(1, 0) == 2**22
    assert pids.of(3, BAND_PID + 3) == BAND_PID + 3
    assert pids.of_rank(1) == (8, 2**22, "Spans (rank 1)")


@pytest.mark.parametrize("value", [0, 5, 2**31, "12", "0xff"])
def test_ids_of_two_ranks_never_meet(value: Any) -> None:
    def renamed(place: int, value: Any) -> Any:
        renamer = Renamer(rank=place, place=place, ranks=2, shift_ns=0, pids=Pids())
        return renamer.rename({"id": value, "args": {"correlation": value}})

    one, two = renamed(0, value), renamed(1, value)
    assert one["id"] != two["id"]
    assert one["id"] == one["args"]["correlation"]
    assert type(one["id"]) is type(value)

"""Tests that the traces of real processes contain what these processes observed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from distributed.launching import Ranks
from distributed.modes import FOUR_RANKS, TWO_RANKS
from moe_trace.read.check import check, read_checked
from moe_trace.read.ranks.merge_plan import plan_merge
from moe_trace.read.ranks.merged_file import write_merged
from moe_trace.read.ranks.report import RankReport
from moe_trace.read.reader import read_summary
from moe_trace.show.json import to_plain

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "DistributedConfig"), reason="this transformers has no DistributedConfig"
)
EXCHANGING = ("ep_all_to_all", "ep_slices", *FOUR_RANKS)


@pytest.fixture
def ranks_of(two_ranks: Ranks, four_ranks: Ranks) -> Any:
    return lambda mode: four_ranks if mode in FOUR_RANKS else two_ranks


def report_of(path: Path) -> RankReport:
    report = read_summary(path).ranks
    assert report is not None
    return report


@pytest.mark.parametrize("mode", EXCHANGING)
def test_matrices_are_the_splits_that_the_exchange_got(mode: str, ranks_of: Any) -> None:
    ranks = ranks_of(mode)
    report = report_of(ranks.traces(mode))
    for row, notes in enumerate(ranks.notes(mode)):
        group = notes["parallel"]["expert_ranks"]
        dispatches = notes["inference"]["splits"][::2]  # a dispatch and a combine a layer
        assert len(dispatches) == len(report.layers) == 3
        for layer, splits in zip(report.layers, dispatches, strict=True):
            assert layer.sent is not None
            assert [layer.sent[row][peer] for peer in group] == splits["sent"]
            assert sum(layer.sent[row]) == sum(splits["sent"]), "nothing goes outside the group"
            assert layer.load[row] == sum(splits["received"])


@pytest.mark.parametrize("mode", EXCHANGING)
def test_bytes_are_those_of_the_tensors_and_of_the_counts(mode: str, ranks_of: Any) -> None:
    ranks = ranks_of(mode)
    report = report_of(ranks.traces(mode))
    check_ = report.bytes_check
    assert (check_.different, check_.unknown) == (0, 0)
    assert check_.equal == 2 * 2 * 3 * ranks.world_size  # directions, dispatch and combine, layers
    for rank, notes in enumerate(ranks.notes(mode)):
        seen = [splits["bytes"] for splits in notes["inference"]["splits"]]
        found = [e for e in report.exchanges if e.rank == rank and e.part in ("dispatch", "combine")]
        assert [e.bytes_in for e in found] == seen
        assert all(e.calls == 1 and e.wait_us is not None and e.wait_us >= 0 for e in found)


@pytest.mark.parametrize("mode", [*TWO_RANKS, *FOUR_RANKS])
def test_counts_of_the_folder_are_those_of_the_single_process(
    mode: str, ranks_of: Any, alone: dict[str, Any]
) -> None:
    if mode == "alone":
        pytest.skip("every process of it routes the same rows on its own")
    summary = read_summary(ranks_of(mode).traces(mode))
    expected = {s.site: s.assignments.tolist() for s in alone["recording"].samples}
    assert {r.info.site: list(r.assignments) for r in summary.routers} == expected
    report = summary.ranks
    assert report is not None
    if mode not in ("tp", "fsdp", "own_fsdp", "ddp"):
        for layer in report.layers:
            assert sum(layer.load) == sum(expected[layer.site]), "each slot is computed once"


@pytest.mark.parametrize(("mode", "split"), [("ep_all_to_all", True), ("tp", True), ("ddp", False)])
def test_experts_have_a_speed_only_where_a_rank_computes_its_own_slots(
    mode: str, split: bool, two_ranks: Ranks
) -> None:
    """Else the whole batch's FLOPs would stand over the time of a part of the work."""
    summary = read_summary(two_ranks.traces(mode))
    assert summary.speed is not None and summary.experts_are_split is split
    for layer in summary.speed.layers:
        assert layer.router.flops_per_s is not None and layer.experts.flops > 0
        assert (layer.experts.flops_per_s is None) is split
    for file in two_ranks.traces(mode).glob("*.gz"):
        counters = {
            e["name"] for e in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"] if e["ph"] == "C"
        }
        assert "load max÷mean" in counters
        assert ("expert TFLOP/s (with gaps)" not in counters) is split


@pytest.mark.parametrize("mode", EXCHANGING)
def test_after_alignment_no_receive_ends_before_its_send(mode: str, ranks_of: Any, tmp_path: Path) -> None:
    """Clocks that were moved apart by hand come together again, to within what the ranks end apart."""
    moved_ns = 7_000_000
    for rank, file in enumerate(sorted(ranks_of(mode).traces(mode).glob("*.gz"))):
        trace = json.loads(gzip.decompress(file.read_bytes()))
        trace.pop("host_name", None)
        trace["baseTimeNanoseconds"] += rank * moved_ns
        (tmp_path / file.name.removesuffix(".gz")).write_text(json.dumps(trace))
    alignment = report_of(tmp_path).alignment
    same_host = report_of(ranks_of(mode).traces(mode)).alignment
    assert (alignment.early_after, same_host.early_before) == (0, 0)
    assert alignment.early_before > 0
    assert alignment.after is not None and same_host.after is not None
    assert alignment.unaligned == ((2, 3) if mode == "efsdp" else ()), "two groups that share nothing"
    first = {2: 2, 3: 2} if mode == "efsdp" else {}
    for rank, offset in alignment.offset_ns.items():
        rank -= first.get(rank, 0)
        assert abs(offset + rank * moved_ns) <= 1000 * same_host.after.max_us + 1
    assert alignment.after.median_us < moved_ns / 1000


@pytest.mark.parametrize("mode", ["ep_all_to_all", "ep_all_reduce", "ep_wide"])
def test_merging_loses_nothing(mode: str, ranks_of: Any, tmp_path: Path) -> None:
    folder = ranks_of(mode).traces(mode)
    out = tmp_path / "all.pt.trace.json.gz"
    merged = write_merged(plan_merge([folder], out), out)
    assert merged.left_out == {}
    assert [broken for rule in check(read_checked(out)).values() for broken in rule] == []
    plain = [to_plain(read_summary(path)) for path in (folder, out)]
    for one in plain:
        for key in ("trace", "files"):
            one.pop(key)
    assert plain[0] == plain[1]
    events = json.loads(gzip.decompress(out.read_bytes()))["traceEvents"]
    apart = [json.loads(gzip.decompress(f.read_bytes()))["traceEvents"] for f in sorted(folder.glob("*.gz"))]
    assert len(events) == sum(map(len, apart))

"""Tests that HolisticTraceAnalysis gives the same results for a merged trace as for the plain one."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_trace.read.file.trace_file import read_trace
from moe_trace.timeline.merge import merge_recording
from paths import DATA
from spliced import without_additions

pytest.importorskip("hta")
pd = pytest.importorskip("pandas")

TRACES = ["h200/prefill_grouped_mm", "h200/train_grouped_mm", "h200_graphs/compiled_model"]


def analysis(folder: Path) -> Any:
    from hta.trace_analysis import TraceAnalysis

    return TraceAnalysis(trace_dir=str(folder))


@pytest.fixture(scope="module", params=TRACES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(plain, merged) analyses of a real H200 trace."""
    source = tmp_path_factory.mktemp("source") / "trace.json.gz"
    shutil.copy(DATA / f"{request.param}.pt.trace.json.gz", source)
    merge_recording(source, [read_trace(source).recording])  # as this release merges
    folders = [tmp_path_factory.mktemp(name) for name in ("plain", "merged")]
    shutil.copy(source, folders[1] / "trace.json.gz")
    unpacked = source.parent / "unpacked.json"
    unpacked.write_bytes(gzip.decompress(source.read_bytes()))
    (folders[0] / "trace.json.gz").write_bytes(gzip.compress(_with_rank(without_additions(unpacked))))
    merged = gzip.decompress(source.read_bytes())
    (folders[1] / "trace.json.gz").write_bytes(gzip.compress(_with_rank(merged)))
    return analysis(folders[0]), analysis(folders[1])


def _with_rank(trace: bytes) -> bytes:
    """HTA asks for the rank of a trace, which a single process does not write."""
    return trace.replace(b'"schemaVersion"', b'"distributedInfo": {"rank": 0}, "schemaVersion"', 1)


def test_temporal_breakdown_is_the_same(both: tuple[Any, Any]) -> None:
    plain, merged = (a.get_temporal_breakdown(visualize=False) for a in both)
    pd.testing.assert_frame_equal(plain, merged)
    assert plain["kernel_time(us)"].iloc[0] > 0


def test_kernel_breakdown_is_the_same(both: tuple[Any, Any]) -> None:
    plain, merged = (a.get_gpu_kernel_breakdown(visualize=False) for a in both)
    for one, other in zip(plain, merged, strict=True):
        pd.testing.assert_frame_equal(one, other)


def test_idle_time_is_the_same(both: tuple[Any, Any]) -> None:
    plain, merged = (a.get_idle_time_breakdown(visualize=False)[0] for a in both)
    pd.testing.assert_frame_equal(plain, merged)

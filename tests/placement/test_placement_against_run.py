"""Tests of the planner's model against a recorded run of two gloo processes with expert parallelism.

The traces in tests/data/gloo_ep2 are those of `scripts/record_ep_steps.py --steps 8`; events other than our
ranges and the all-to-alls were removed.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from moe_trace.placement.recorded import counts_of_traces
from paths import ROOT

RUN = ROOT / "tests" / "data" / "gloo_ep2"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_placement", ROOT / "scripts/check_placement.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["check_placement"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_load_per_rank_is_exact_on_the_same_steps(script: ModuleType) -> None:
    text, exact = script.check(RUN)
    assert exact and "0 of 64 loads differ" in text
    assert text.split("\n\n", 1)[1].strip() in (ROOT / "docs" / "placement.md").read_text("utf-8")


def test_received_rows_are_those_of_the_other_ranks_counts(script: ModuleType) -> None:
    """By hand, from the collective's arguments and the recorded counts alone: 8 experts a rank."""
    rows = script.received_rows(RUN)
    counts = counts_of_traces(RUN).counts_SLE
    assert rows.shape == (8, 4, 2, 2) and rows.sum() == counts.sum() == 262_144
    assert np.array_equal(rows.sum(axis=3)[..., 0], counts[..., :8].sum(axis=2))
    assert np.array_equal(rows.sum(axis=3)[..., 1], counts[..., 8:].sum(axis=2))


def test_the_check_can_fail(script: ModuleType, tmp_path: Path) -> None:
    folder = shutil.copytree(RUN, tmp_path / "run")
    path = folder / "rank1.pt.trace.json.gz"
    trace = json.loads(gzip.decompress(path.read_bytes()))
    first = next(
        e
        for e in trace["traceEvents"]
        if e["name"] == "c10d::alltoall_base_" and e["args"]["Input type"][0] == "float"
    )
    mine, other = json.loads(first["args"]["Concrete Inputs"][3])
    first["args"]["Concrete Inputs"][3] = f"[{mine + 1}, {other}]"
    path.write_bytes(gzip.compress(json.dumps(trace).encode()))
    text, exact = script.check(folder)
    assert not exact and "1 of 64 loads differ, the largest by 1 rows" in text


def test_nccl_tells_the_same_in_its_own_words(script: ModuleType, tmp_path: Path) -> None:
    """The same run as NCCL would write it: `record_param_comms`, with the split sizes as text."""
    folder = shutil.copytree(RUN, tmp_path / "run")
    for path in folder.iterdir():
        trace = json.loads(gzip.decompress(path.read_bytes()))
        for event in trace["traceEvents"]:
            if event["name"] == "c10d::alltoall_base_":
                whole = event["args"]["Input type"][0] == "long int"
                event["args"] = {
                    "Collective name": "all_to_all" if whole else "all_to_allv",
                    "dtype": "Long" if whole else "Float",
                    "Out split size": event["args"]["Concrete Inputs"][3],
                }
                event["name"] = "record_param_comms"
        path.write_bytes(gzip.compress(json.dumps(trace).encode()))
    assert np.array_equal(script.received_rows(folder), script.received_rows(RUN))

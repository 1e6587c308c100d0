"""Tests that recorded GPU traces give exactly the stored figures (`scripts/record_figures.py`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from record_figures import DATA, FIGURES, differences, figures_of, traces

STORED = json.loads(FIGURES.read_text())


@pytest.mark.parametrize("trace", traces(), ids=lambda path: path.name.partition(".")[0])
def test_a_recorded_trace_gives_the_stored_figures(trace: Path) -> None:
    assert list(differences(STORED[trace.relative_to(DATA).as_posix()], figures_of(trace))) == []


def test_one_nanosecond_is_a_difference() -> None:
    stored = {"phases": {"busy_us": 1.001, "gone": 1}}
    found = list(differences(stored, {"phases": {"busy_us": 1.002, "new": 0}}))
    assert found == ["/phases/busy_us: 1.002 instead of 1.001", "/phases/gone: None instead of 1"]

"""Tests of notebook output: tables, a figure, short reprs, data frames; content of files is not executed."""

from __future__ import annotations

import re
from base64 import b64decode
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

import moe_trace
from moe_trace.data.display.load_picture import load_picture
from moe_trace.data.summary import summarize
from moe_trace.read.ranks.same_run import pooled
from moe_trace.read.reader import read_recording, read_summary
from paths import DATA
from tiny_trace import write_tiny

H200 = DATA / "h200"


def test_each_record_shows_itself(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "a.json")
    summary, live = read_summary(path), summarize(read_recording(path))
    comparison = moe_trace.compare(summary, summary)
    for record in (summary, live, comparison, summary.samples[0]):
        html = record._repr_html_()
        assert html is not None and "<table" in html and "<script" not in html
    for record in (summary, live, comparison):
        assert len(repr(record)) < 300


def test_no_record_fills_the_screen() -> None:
    """Of real size: 16 layers of 64 experts."""
    summary = read_summary(DATA / "h100" / "prefill_decode_16_layers.pt.trace.json.gz")
    phases = summary.phases
    assert phases is not None
    records = (summary.samples[0], summary.routers[0], phases, phases.total, summary.speed, *summary.findings)
    assert max(len(repr(record)) for record in records) < 1000
    assert "tokens=2048" in repr(summary.samples[0]) and "assignments=<64>" in repr(summary.samples[0])
    for answer in moe_trace.ask(summary):
        assert repr(answer) == f"<Answer {answer}>"


def test_a_comparison_shows_distances_and_set_up() -> None:
    a, b = (read_summary(H200 / f"prefill_{how}.pt.trace.json.gz") for how in ("eager", "grouped_mm"))
    html = moe_trace.compare(a, b)._repr_html_()
    assert html is not None and "experts implementation" in html and "width:" in html


def test_names_from_a_file_are_escaped(tmp_path: Path) -> None:
    live = summarize(read_recording(write_tiny(tmp_path / "a.json")))
    html = replace(live, model={"name": "<img src=x>"})._repr_html_()
    assert html is not None and "<img src" not in html


def test_a_summary_shows_the_load_of_its_experts(tmp_path: Path) -> None:
    """As a picture that needs no script: of a live recording one, of a trace one for each stage."""
    path = write_tiny(tmp_path / "a.json")
    summary, live = read_summary(path), summarize(read_recording(path))
    for record, parts in ((live, [live]), (summary, [*summary.by_stage().values()])):
        found = re.findall(r'src="data:image/png;base64,([^"]+)"', record._repr_html_() or "")
        assert len(found) == len(parts)
        for text, part in zip(found, parts, strict=True):
            picture = np.asarray(Image.open(BytesIO(b64decode(text))))
            assert (picture == load_picture([router.assignments for router in part.routers])).all()


def test_data_frames(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "a.json")
    frame = summarize(read_recording(path)).to_dataframe()
    assert isinstance(frame, pandas.DataFrame) and frame["site"].tolist() == ["L00", "L01"]
    assert frame["load_max_over_mean"][0] == pytest.approx(1.5)
    assert len(read_summary(path).to_dataframe()) == len(read_summary(path).samples)


def test_old_names_still_answer(tmp_path: Path) -> None:
    summary = read_summary(write_tiny(tmp_path / "a.json"))
    with pytest.deprecated_call(match=r"most_imbalanced_layer\(\)"):
        assert summary.which_layer_is_most_uneven() is summary.most_imbalanced_layer()
    with pytest.deprecated_call(match=r"dead_experts\(\)"):
        assert summary.which_experts_are_dead() == summary.dead_experts()
    with pytest.deprecated_call(match="moe_time_fraction"):
        assert summary.how_much_of_the_model_is_moe() == summary.moe_time_fraction


def test_several_runs_in_a_folder_are_said_to_be_several() -> None:
    first, later = "host_11.1795645729588696128.pt.trace.json", "host_11.1795645729588699999.pt.trace.json.gz"
    other = "host_22.1795645729588696128.pt.trace.json"
    assert pooled([(first, 0), (later, 0)]) == []  # a schedule that repeats
    assert pooled([(first, 0), (other, 1)]) == []  # ranks of one run
    (note,) = pooled([(first, 0), (later, 0), (other, 0)])
    assert "2 runs" in note and "host_11 (2)" in note and "host_22 (1)" in note

"""Tests of runs that appear, disappear or cannot be read, in the MoE tab in a real Chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Frame, Page

from paths import DATA

from .harness import tensorboard, wait_until
from .moe_tab import Watch, open_view, wait_ready
from .test_dashboard import reload_data
from .test_tensorboard import keep_screenshot

pytestmark = pytest.mark.browser

H200 = DATA / "h200"
TRAIN, PREFILL = "train_grouped_mm.pt.trace.json.gz", "prefill_grouped_mm.pt.trace.json.gz"
BAD = {
    "empty": ("a.pt.trace.json", b"", "empty"),
    "foreign": ("a.pt.trace.json", b'{"traceEvents": []}', "without moe_trace data"),
    "half": ("a.pt.trace.json.gz", (H200 / TRAIN).read_bytes()[:50_000], "truncated"),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two good runs, one of them with a name that is no UTF-8, and a run for each way of being bad."""
    monkeypatch.setenv("HOME", str(tmp_path))
    runs = tmp_path / "runs"
    for folder in (runs / "train", Path(os.fsdecode(bytes(runs) + b"/odd\xff"))):
        folder.mkdir(parents=True)
        shutil.copy(H200 / TRAIN, folder)
    for name, (file, content, _) in BAD.items():
        (runs / name).mkdir()
        (runs / name / file).write_bytes(content)
    (runs / "pipe").mkdir()
    os.mkfifo(runs / "pipe" / "a.pt.trace.json")
    return tmp_path


@pytest.fixture
def watch(page: Page) -> Iterator[Watch]:
    """The page of the test; it may ask for a trace that is gone, and nothing else may be wrong with it."""
    found = Watch()
    found.attach(page)
    yield found
    assert [error for error in found.errors if "404" not in error] == []


def offered(frame: Frame) -> list[str]:
    return frame.locator("header .fields select").first.locator("option").all_inner_texts()


def test_runs_come_and_go_below_a_home_folder(
    page: Page, watch: Watch, home: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`tensorboard --logdir=~/runs`, which no shell expands."""
    with tensorboard(Path("~/runs"), tmp_path_factory.mktemp("scratch")) as url:
        frame = open_view(page, url, "overview", run="train")
        frame.locator(".picker[data-checked]").wait_for()
        assert {"train", "odd\\xff"} <= set(offered(frame))
        frame.locator(".broken summary").click()
        listed = frame.locator(".broken li").all_inner_texts()
        for name, reason in {**{n: r for n, (*_, r) in BAD.items()}, "pipe": "no regular file"}.items():
            (line,) = [line for line in listed if line.startswith(f"{name}/")]
            assert reason in line
        keep_screenshot(page, "runs_bad")
        frame.locator(".broken summary").click()

        shutil.copytree(home / "runs" / "train", home / "runs" / "later")
        reload_data(page)
        wait_until(lambda: "later" in offered(frame), "the new run")

        (home / "runs" / "train" / TRAIN).unlink()  # between two requests
        frame.locator("nav [data-view=time]").click()
        frame.locator(".problem").wait_for()
        assert "no trace of that name" in frame.locator(".problem").inner_text()
        keep_screenshot(page, "runs_gone")
        before = int(frame.locator("main").get_attribute("data-ready") or 0)
        reload_data(page)
        wait_ready(frame, before)
        assert "train" not in offered(frame) and frame.locator("figure").count() > 0
        assert "p.moe.run=train&" not in page.url, "the address names what is shown"


def test_each_folder_of_a_logdir_spec_is_named(
    page: Page, watch: Watch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for name, file in (("a", TRAIN), ("b", PREFILL)):
        (tmp_path / name / "run").mkdir(parents=True)
        shutil.copy(H200 / file, tmp_path / name / "run")
    spec = f"--logdir_spec=first:{tmp_path / 'a'},second:{tmp_path / 'b'}"
    with tensorboard(None, tmp_path_factory.mktemp("scratch"), spec) as url:
        frame = open_view(page, url, "overview", run="second/run")
        assert offered(frame) == ["first/run", "second/run"]
        frame.locator("nav [data-view=compare]").click()
        frame.locator("[data-figure=setup]").wait_for()
        keep_screenshot(page, "runs_logdir_spec")
        assert frame.locator(".sides select").first.input_value().startswith("first/run")

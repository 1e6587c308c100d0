"""Make the pictures of README and docs from real traces, in a real browser.

    python scripts/pictures.py [--only timeline,dashboard_routing] [--out docs/images]

`timeline` is torch-tb-profiler's Trace view of one forward of OLMoE-1B-7B on an H100, from its first MoE
layer to its last. It shows the process "MoE routing" with its counters and lanes, and below it the operators
of the CPU and the kernels of the GPU. The other pictures show the MoE tab and the HTML report. The
requirements are those of the browser tests.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from moe_trace.cli import main as moe_trace_command
from moe_trace.data.schema import BAND_NAME
from moe_trace.read.file.trace_file import read_trace
from moe_trace.timeline.merge import merge_recording

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
sys.path.insert(0, str(ROOT / "tests"))

from browser.harness import Internet, chromium, find_chromium, offline_context, tensorboard  # noqa: E402
from browser.moe_tab import open_view  # noqa: E402
from browser.trace_view import open_trace_view, still_screenshot, timeline_frame, tracks  # noqa: E402

# run -> the name of its trace, and the file
RUNS = {
    "OLMoE-1B-7B": ("H100", "h100/prefill_decode_16_layers"),
    "training": ("H100", "h100/train_checkpointed"),
    "eager": ("H200", "h200/prefill_eager"),
    "grouped_mm": ("H200", "h200/prefill_grouped_mm"),
}
ENDING = ".pt.trace.json.gz"
WIDTH, COLOURS = 1280, 256
MARGIN = 0.02  # share of the forward's duration, on both sides
WINDOW = {"width": 1440, "height": 1300}  # tall enough for every row
BELOW_PX = 12


@dataclass(frozen=True)
class Tab:
    """A view of the MoE tab."""

    view: str
    run: str
    height: int
    theme: str = "light"
    state: dict[str, str] = field(default_factory=dict)
    """Further parameters of the address."""


TABS = {
    "dashboard_overview": Tab("overview", "OLMoE-1B-7B", 900),
    "dashboard_routing": Tab("routing", "OLMoE-1B-7B", 1000, "dark"),
    "dashboard_time": Tab("time", "training", 1080),
    "dashboard_timeline": Tab("timeline", "OLMoE-1B-7B", 1150, "dark"),
    "dashboard_compare": Tab(
        "compare", "eager", 1050, state={"run_b": "grouped_mm", "trace_b": f"H200{ENDING}"}
    ),
}
REPORT_HEIGHT = 1000
# Zooms to the time from the first to the last slice of our lanes that belongs to a layer's n-th forward.
ZOOM = """([band, forward, margin]) => {
  const viewer = document.querySelector("#trace-viewer");
  const seen = new Map();
  const ends = [];
  for (const thread of viewer.model.getAllThreads().filter((one) => one.parent.name === band)) {
    for (const slice of [...thread.sliceGroup.slices].sort((a, b) => a.start - b.start)) {
      const key = `${thread.name} ${slice.title}`;
      const nth = seen.get(key) ?? 0;
      seen.set(key, nth + 1);
      if (nth === forward) ends.push(slice.start, slice.end);
    }
  }
  const [from, to] = [Math.min(...ends), Math.max(...ends)];
  const view = viewer.trackView;
  view.mouseModeSelector_.pos = {x: 0, y: 2000}; // its tools would cover what is behind them
  const width = view.viewport.modelTrackContainer_.canvas.width;
  const transform = new tr.ui.TimelineDisplayTransform();
  transform.xSetWorldBounds(from - margin * (to - from), to + margin * (to - from), width);
  view.viewport.setDisplayTransformImmediately(transform);
}"""


def main() -> int:
    """Merge with this release, open the pages, and write the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--only", help="names, comma-separated")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else ["timeline", *TABS, "html_report"]
    executable = find_chromium()
    if executable is None:
        sys.exit("found no Chromium")
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder) / "logs"
        for run, (name, source) in RUNS.items():
            (logs / run).mkdir(parents=True)
            copy = logs / run / f"{name}{ENDING}"
            copy.write_bytes((DATA / f"{source}{ENDING}").read_bytes())
            merge_recording(copy, [read_trace(copy).recording])
        with (
            tensorboard(logs, Path(folder)) as url,
            chromium(executable) as browser,
            offline_context(browser, Internet()) as context,
        ):
            page = context.new_page()
            for name in names:
                target = arguments.out / f"{name}.png"
                write_small(target, _picture(name, page, url, logs))
                print(f"wrote {target}: {target.stat().st_size / 1000:.0f} kB")
    return 0


def _picture(name: str, page: Any, url: str, logs: Path) -> bytes:
    if name == "timeline":
        return picture_of_timeline(page, url)
    if name == "html_report":
        return picture_of_report(page, logs)
    return picture_of_tab(page, url, TABS[name])


def picture_of_timeline(page: Any, url: str) -> bytes:
    page.set_viewport_size(WINDOW)
    open_trace_view(page, url, "OLMoE-1B-7B")
    timeline_frame(page).evaluate(ZOOM, [BAND_NAME, 0, MARGIN])
    still_screenshot(page)  # the rows are redrawn in small tasks
    height = max(track.bottom for track in tracks(page)) + BELOW_PX
    return bytes(page.screenshot(clip={"x": 0, "y": 0, "width": WINDOW["width"], "height": height}))


def picture_of_tab(page: Any, url: str, tab: Tab) -> bytes:
    page.set_viewport_size({"width": WIDTH, "height": tab.height})
    page.goto(url)
    page.evaluate(f"localStorage.setItem('_tb_global_settings', JSON.stringify({{theme: '{tab.theme}'}}))")
    frame = open_view(page, url, tab.view, run=tab.run, **tab.state)
    frame.locator(".picker[data-checked]").wait_for()
    return still_screenshot(page)


def picture_of_report(page: Any, logs: Path) -> bytes:
    html = logs / "report.html"
    with contextlib.chdir(logs):  # the page shows the path given on the command line
        moe_trace_command(["report", f"OLMoE-1B-7B/H100{ENDING}", "--html", str(html)])
    page.set_viewport_size({"width": WIDTH, "height": REPORT_HEIGHT})
    page.goto(html.as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
    return still_screenshot(page)


def write_small(target: Path, png: bytes) -> None:
    """Write a picture with few colours: a third of the size, without a visible difference."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)


if __name__ == "__main__":
    sys.exit(main())

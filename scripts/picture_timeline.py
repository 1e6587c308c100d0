"""The picture at the top of the README: a real trace in torch-tb-profiler's Trace view.

    python scripts/picture_timeline.py [TRACE] [--out docs/images/timeline.png] [--forward 0]

Shows one forward of the model, from its first MoE layer to its last: the process "MoE routing" with its
counters and lanes, below it the CPU's operators and the GPU's kernels. Needs what the browser tests need.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from moe_trace.data.schema import BAND_NAME
from moe_trace.read.file.trace_file import read_trace
from moe_trace.timeline.merge import merge_recording

ROOT = Path(__file__).resolve().parents[1]
TRACE = ROOT / "tests" / "data" / "h100" / "prefill_decode_16_layers.pt.trace.json.gz"
MARGIN = 0.02  # of the forward's length, on both sides
WINDOW = {"width": 1440, "height": 1300}  # high enough for every row
BELOW_PX = 12
# Shows the time from the first to the last slice of our lanes that belongs to a layer's n-th forward.
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
    """Merge by this release, open, zoom, write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path, nargs="?", default=TRACE)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "timeline.png")
    parser.add_argument("--forward", type=int, default=0, help="which of the trace's forwards (default 0)")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from browser.harness import Internet, chromium, find_chromium, offline_context, tensorboard
    from browser.trace_view import open_trace_view, still_screenshot, timeline_frame, tracks

    executable = find_chromium()
    if executable is None:
        sys.exit("found no Chromium")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "logs" / "OLMoE-1B-7B"
        run.mkdir(parents=True)
        copy = run / "H100.pt.trace.json.gz"
        copy.write_bytes(arguments.trace.read_bytes())
        merge_recording(copy, [read_trace(copy).recording])
        with (
            tensorboard(run.parent, Path(folder)) as url,
            chromium(executable) as browser,
            offline_context(browser, Internet()) as context,
        ):
            page = context.new_page()
            page.set_viewport_size(WINDOW)
            open_trace_view(page, url, run.name)
            timeline_frame(page).evaluate(ZOOM, [BAND_NAME, arguments.forward, MARGIN])
            still_screenshot(page)  # the rows are drawn anew in small tasks
            height = max(track.bottom for track in tracks(page)) + BELOW_PX
            clip = {"x": 0, "y": 0, "width": WINDOW["width"], "height": height}
            arguments.out.write_bytes(page.screenshot(clip=clip))
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

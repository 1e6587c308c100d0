"""Read the Trace view of torch-tb-profiler: chrome://tracing's viewer inside two nested frames.

The viewer brings a shadow DOM polyfill that replaces the page's own query functions. Playwright's selectors
fail on it, so the inner frame is only accessed by our own scripts, the mouse and the keyboard.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Frame, FrameLocator, Page

from .harness import wait_for_run, wait_until

TRACE_PAGES = ("/trace_embedding.html", "/?trace=")  # in TensorBoard, and of `moe-trace view TRACE`
# In the order of the page: Runs, Views, Workers.
RUN_LIST, VIEW_LIST = 0, 1
# A pixel whose colour channels differ by more than this is part of a slice or a counter: the rest is grey.
COLOURED = 24

DOM_FUNCTIONS = """
  const isShown = (element) => element.getBoundingClientRect().height > 0;
  const descendants = (root) => [...(root.children || [])].flatMap((child) =>
    [child, ...descendants(child), ...(child.shadowRoot ? descendants(child.shadowRoot) : [])]);
  const byTag = (root, tag) => descendants(root).filter((e) => e.tagName === tag);
  const byClass = (root, name) => descendants(root).filter((e) => e.classList.contains(name));
  const byId = (root, id) => descendants(root).find((e) => e.id === id);
  const text = (node) => [...node.childNodes].map((child) =>
    child.nodeType === 3 ? child.textContent :
    child.nodeType !== 1 || ['STYLE', 'SCRIPT', 'TEMPLATE'].includes(child.tagName) ? '' :
    text(child) + (child.shadowRoot ? text(child.shadowRoot) : '') + ' ').join('');
  const box = (element) => {
    const {x, y, width, height} = element.getBoundingClientRect();
    return {x, y, width, height};
  };
"""
TRACKS_SCRIPT = """
  return byClass(document.body, 'process-track-base').flatMap((process) => {
    const name = text(byClass(process, 'process-track-name')[0]);
    const right = process.getBoundingClientRect().right;
    return byTag(process, 'TR-UI-B-HEADING').filter((h) => isShown(h) && text(h).trim())
      .map((heading) => ({process: name, name: text(heading), right, ...box(heading)}));
  });
"""


@dataclass(frozen=True)
class Track:
    """One row of the timeline. The box is that of its drawing, beside the heading, in pixels of the page."""

    process: str
    name: str
    left: int
    top: int
    right: int
    bottom: int


def open_trace_view(page: Page, url: str, run: str) -> None:
    """Opens the Trace view of `run` as a user does, and waits until its timeline stands still."""
    open_profiler_view(page, url, run, "Trace")
    wait_for_timeline(page)


def open_profiler_view(page: Page, url: str, run: str, view: str) -> FrameLocator:
    """Chooses the run and the view in torch-tb-profiler's page, which it gives."""
    wait_for_run(url, run)
    page.goto("about:blank")
    page.goto(f"{url}/#pytorch_profiler")
    profiler = page.frame_locator("iframe")
    _choose(profiler, RUN_LIST, run)
    choose_view(profiler, view)
    return profiler


def choose_view(profiler: FrameLocator, view: str) -> None:
    """Another view of the same run."""
    _choose(profiler, VIEW_LIST, view)


def wait_for_timeline(page: Page) -> bytes:
    """Waits until chrome://tracing's viewer, in a frame or alone, has drawn its rows; a screenshot then."""
    frame = timeline_frame(page)
    rows = f"{DOM_FUNCTIONS} return (() => {{ {TRACKS_SCRIPT} }})().length"
    frame.wait_for_function(f"() => {{ if (!document.body) return 0; {rows}; }}")
    return still_screenshot(page)


def tracks(page: Page) -> list[Track]:
    """The rows that the timeline shows, from top to bottom."""
    frame = timeline_frame(page)
    origin = _origin(frame)
    return [_track(row, origin) for row in _evaluate(frame, TRACKS_SCRIPT)]


def track_names(page: Page, process: str = "") -> list[str]:
    """Names of the rows, from top to bottom, of the processes whose heading holds `process`.

    >>> track_names(page, "MoE routing")
    ['active experts', 'load max÷mean', 'router', 'experts']
    """
    return [track.name for track in tracks(page) if process in track.process]


def drawn_columns(page: Page, screenshot: bytes | None = None) -> dict[tuple[str, str], int]:
    """For each (process, track): in how many columns of pixels something is drawn.

    A row with a heading and nothing in it has 0. The vertical lines that mark an instant cross every row, so
    columns coloured in all rows don't count.
    """
    rows = tracks(page)
    image = Image.open(io.BytesIO(screenshot or still_screenshot(page)))
    pixels = np.asarray(image.convert("RGB")).astype(np.int16)
    coloured = np.ptp(pixels, axis=2) > COLOURED
    columns = [coloured[row.top : row.bottom].any(axis=0) for row in rows]
    everywhere = np.logical_and.reduce(columns)
    return {
        (row.process, row.name): int((column & ~everywhere)[row.left : row.right].sum())
        for row, column in zip(rows, columns, strict=True)
    }


def search(page: Page, words: str) -> int:
    """Types `words` into the viewer's search field; the number of events it finds.

    The hits are highlighted and everything else turns grey, so look at colours before.
    """
    frame = timeline_frame(page)
    field = _evaluate(frame, "return box(byId(document.body, 'filter'));")
    left, top = _origin(frame)
    page.mouse.click(left + field["x"] + field["width"] / 2, top + field["y"] + field["height"] / 2)
    page.keyboard.press("Control+A")
    page.keyboard.type(words)
    return wait_until(lambda: _hit_count(frame), f"the search for {words!r} to end") - 1


def select_next_hit(page: Page) -> str:
    """Selects the next event that the last search found; what the panel below the timeline says of it."""
    frame = timeline_frame(page)
    before = _panel_text(frame)
    page.keyboard.press("Enter")
    return wait_until(lambda: _changed(_panel_text(frame), before), "the panel to show the event")


def still_screenshot(page: Page) -> bytes:
    """A screenshot (PNG) of the page once two in a row are the same: the viewer draws in many small tasks."""
    last = b""

    def same_as_last() -> bytes | None:
        nonlocal last
        before, last = last, page.screenshot()
        return last if last == before else None

    return wait_until(same_as_last, "the page to stand still")


def _choose(profiler: FrameLocator, index: int, option: str) -> None:
    button = profiler.locator("[role=button][aria-haspopup=listbox]").nth(index)
    if button.inner_text().strip() == option:
        return
    button.click()
    profiler.get_by_role("option", name=option, exact=True).click()


def timeline_frame(page: Page) -> Frame:
    """The frame of the viewer itself, once it is there."""

    def find() -> Frame | None:
        page.title()  # a call of any kind lets playwright take in that frames came and went
        return next((frame for frame in page.frames if any(name in frame.url for name in TRACE_PAGES)), None)

    return wait_until(find, "the Trace view's frame")


def _evaluate(frame: Frame, script: str) -> Any:
    return frame.evaluate(f"() => {{ {DOM_FUNCTIONS} {script} }}")


def _origin(frame: Frame) -> tuple[float, float]:
    """Where the frame's upper left corner is on the page."""
    if frame.parent_frame is None:
        return 0.0, 0.0
    place = frame.frame_element().bounding_box()
    assert place is not None, "the Trace view is hidden"
    return place["x"], place["y"]


def _track(row: dict[str, Any], origin: tuple[float, float]) -> Track:
    left, top = origin
    return Track(
        process=_plain(row["process"]),
        name=_plain(row["name"]),
        left=round(left + row["x"] + row["width"]),
        top=round(top + row["y"]),
        right=round(left + row["right"]),
        bottom=round(top + row["y"] + row["height"]),
    )


def _plain(heading: str) -> str:
    """A heading without its triangle, its line breaks, and the colon that the viewer puts behind counters."""
    return re.sub(r"\s+", " ", heading).strip(" ▾▸▼►").removesuffix(":")


def _hit_count(frame: Frame) -> int | None:
    """1 + the number of hits, so that an ended search is true even without hits; None while it runs."""
    shown = re.fullmatch(
        r"\d+ of (\d+)", _evaluate(frame, "return text(byId(document.body, 'hitCount'));").strip()
    )
    return int(shown[1]) + 1 if shown else None


def _panel_text(frame: Frame) -> str:
    words = _evaluate(frame, "return byTag(document.body, 'TR-UI-A-ANALYSIS-VIEW').map(text).join(' ');")
    return re.sub(r"\s+", " ", words).strip()


def _changed(now: str, before: str) -> str | None:
    return now if now != before else None

"""Open the MoE tab as a user does, and read what it shows."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Frame, Page

from .harness import VENDOR, Internet, wait_until

VIEWS = ("overview", "routing", "time", "timeline", "compare", "ranks")


@dataclass
class Watch:
    """What the page complained about, and what it asked of the internet."""

    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def attach(self, page: Page) -> None:
        page.on("console", lambda message: self._console(message.type, message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda r: self.outside.append(r.url) if Internet.is_outside(r.url) else None)
        page.on("dialog", lambda dialog: (self.errors.append(f"dialog {dialog.message}"), dialog.dismiss()))

    def _console(self, kind: str, text: str) -> None:
        if kind == "error":
            self.errors.append(text)


def open_view(page: Page, url: str, view: str, **state: str | int) -> Frame:
    """A fresh page with that address; returns once the view stands."""
    page.goto("about:blank")
    page.goto(address(url, view, **state))
    frame = plugin_frame(page)
    wait_ready(frame)
    return frame


def switch_view(frame: Frame, view: str) -> None:
    """By the button, as a user does: the page is not loaded again."""
    before = int(frame.locator("main").get_attribute("data-ready") or 0)
    frame.locator(f"nav [data-view={view}]").click()
    wait_ready(frame, before)


def address(url: str, view: str, **state: str | int) -> str:
    """The address that the tab itself would write."""
    parts = [
        f"p.moe.{name}={urllib.parse.quote(str(v), safe='')}" for name, v in {"view": view, **state}.items()
    ]
    return f"{url}/#moe&" + "&".join(parts)


def plugin_frame(page: Page) -> Frame:
    """The tab's own frame, once it is there."""

    def find() -> Frame | None:
        page.title()  # a call of any kind lets playwright take in that frames came and went
        return next((f for f in page.frames if "plugin_entry.html?name=moe" in f.url), None)

    return wait_until(find, "the MoE tab's frame")


def wait_ready(frame: Frame, after: int = 0) -> int:
    """Waits until a drawing later than `after` stands; its number."""
    frame.wait_for_function(f"() => Number(document.getElementById('main')?.dataset.ready) > {after}")
    return int(frame.evaluate("() => Number(document.getElementById('main').dataset.ready)"))


def shown_numbers(frame: Frame) -> list[dict[str, Any]]:
    """Every number of the page that says where in the report it stands."""
    found = frame.eval_on_selector_all(
        "[data-path]",
        "all => all.map(e => ({path: e.dataset.path, value: Number(e.dataset.value), text: e.textContent}))",
    )
    return list(found)


def shown_tables(frame: Frame) -> dict[str, list[dict[str, Any]]]:
    """Figure key -> rows, each {heading: text or number}; the text of a number must be a number's."""
    return dict(
        frame.evaluate(
            """() => Object.fromEntries([...document.querySelectorAll('[data-figure]')].map(figure => {
              const heads = [...figure.querySelectorAll('thead th')].map(th =>
                th.querySelector('.term, span')?.firstChild?.textContent ?? th.textContent);
              const rows = [...figure.querySelectorAll('tbody tr')].map(tr =>
                Object.fromEntries([...tr.children].map((cell, i) => [heads[i],
                  cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value)])));
              return [figure.dataset.figure, rows];
            }))"""
        )
    )


def accessibility_problems(frame: Frame) -> list[str]:
    """What axe-core finds, one line a rule."""
    if not frame.evaluate("() => 'axe' in window"):
        frame.evaluate((VENDOR / "axe.min.js").read_text(encoding="utf-8"))
    result = frame.evaluate(
        "() => axe.run(document, {resultTypes: ['violations'], runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', "
        "'wcag21aa', 'best-practice']})"
    )
    return [
        f"{v['id']}: {v['help']}: "
        + "; ".join(n["html"][:160] + " " + n["failureSummary"][:200] for n in v["nodes"][:3])
        for v in result["violations"]
    ]


def undrawn_plots(frame: Frame) -> list[str]:
    """Titles of the figures without any mark on their plot."""
    return list(
        frame.evaluate(
            """() => [...document.querySelectorAll('figure')].filter(figure => {
              const plot = figure.querySelector('.plot');
              const marks = plot.querySelectorAll('.point, .heatmaplayer image, .js-line, .trace');
              return ![...marks].some(mark => mark.getBoundingClientRect().width > 0);
            }).map(figure => figure.querySelector('h2').textContent)"""
        )
    )

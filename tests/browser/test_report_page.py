"""Tests of the HTML report in a real Chromium, offline: drawing, keyboard, theme, and no requests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from moe_trace.cli import main
from paths import DATA
from tiny_trace import write_tiny

from .harness import SCREENSHOTS

pytestmark = pytest.mark.browser

H200 = DATA / "h200" / "train_grouped_mm.pt.trace.json.gz"
EVIL = "</script><img src=x onerror=window.owned=1>"
KEYS = ("experts", "load", "entropy", "latency", "forward-device", "backward-device")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["report", str(H200), "--html", str(page)]) == 0
    return page


def open_page(browser: Browser, file: Path, *, width: int, theme: Any = "light") -> tuple[Page, list[str]]:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, offline=True)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request",
        lambda request: request.url.startswith(("file:", "data:", "blob:")) or problems.append(request.url),
    )
    page.goto(file.as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
    return page, problems


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 800])
def test_draws_offline_without_a_complaint(browser: Browser, report: Path, theme: str, width: int) -> None:
    page, problems = open_page(browser, report, width=width, theme=theme)
    for key in KEYS:
        plot = page.locator(f"#f0-{key}")
        assert plot.locator(".main-svg").count() > 0, key
        box = plot.bounding_box()
        assert box is not None and box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (theme == "dark")
    SCREENSHOTS.mkdir(exist_ok=True)
    # Not by `path=`: playwright would write it in a thread that outlives the test.
    (SCREENSHOTS / f"report_{theme}_{width}.png").write_bytes(page.screenshot(full_page=True))
    assert problems == []
    page.context.close()


def test_slider_obeys_the_keyboard(browser: Browser, tmp_path: Path) -> None:
    trace = write_tiny(tmp_path / "a.json", counts=lambda layer, call: (8 - call, call, 0, 0), calls=3)
    assert main(["report", str(trace), "--html", str(tmp_path / "a.html")]) == 0
    page, problems = open_page(browser, tmp_path / "a.html", width=1400)
    slider = page.locator("#f0-decode-experts-step")
    shown = "document.getElementById('f0-decode-experts').data[0].z[0]"
    assert page.evaluate(shown) == [3.25, 0.75, 0, 0]
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#f0-decode-experts-label").text_content() == "step 1"
    assert slider.get_attribute("aria-valuetext") == "step 1"
    assert page.evaluate(shown) == [3.5, 0.5, 0, 0]
    page.keyboard.press("End")
    assert page.evaluate(shown) == [3, 1, 0, 0]
    assert problems == []
    page.context.close()


def test_tables_and_labels_for_a_screen_reader(browser: Browser, report: Path) -> None:
    page, _ = open_page(browser, report, width=1400)
    assert page.locator("figure").count() == len(KEYS)
    for figure in page.locator("figure").all():
        summary = figure.locator("details > summary")
        summary.focus()
        page.keyboard.press("Enter")
        table = figure.locator("table")
        assert table.is_visible() and table.locator("tbody tr").count() == 2
        assert table.locator("th[scope=col]").count() > 1 and table.locator("th[scope=row]").count() == 2
        assert figure.locator("[role=img]").get_attribute("aria-labelledby")
    page.context.close()


def test_theme_button_and_print(browser: Browser, report: Path) -> None:
    page, problems = open_page(browser, report, width=1400)
    page.locator("#theme").press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    colour = "getComputedStyle(document.querySelector('#f0-load .xtick text')).fill"
    assert page.evaluate(colour) == "rgb(230, 237, 243)"
    page.emulate_media(media="print")
    assert page.locator("#theme").is_hidden() and page.locator(".slider").first.is_hidden()
    assert len(page.pdf()) > 10_000
    assert problems == []
    page.context.close()


def test_hostile_names_stay_text(browser: Browser, tmp_path: Path) -> None:
    model = {"name": EVIL, "class": EVIL, "dtype": EVIL, "hidden_size": 8}
    trace = write_tiny(
        tmp_path / "a.json", model=model, sites=[EVIL, "<a href='javascript:1'>L01</a>"], devices=[EVIL]
    )
    target = tmp_path / "evil.html"
    assert main(["report", str(trace), "--html", str(target)]) == 0
    page, problems = open_page(browser, target, width=1400)
    page.wait_for_timeout(200)
    assert page.evaluate("window.owned") is None
    assert page.locator("img, a[href^=javascript]").count() == 0
    assert EVIL in (page.locator("h1").text_content() or "")
    drawn = page.locator("#f0-prefill-experts .ytick text").all_text_contents()
    assert any("<a href" in text for text in drawn), "the name is drawn as it is, not as a link"
    assert problems == []
    page.context.close()

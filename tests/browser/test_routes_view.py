"""Tokens in the colours of their experts, in the page and in the tab, in a real Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Frame, Locator, Page, expect

from moe_trace import RecordedRoutes
from moe_trace.cli import main
from moe_trace.data.routes.reader import save_routes
from moe_trace.demo import DEMO_PROMPTS
from moe_trace.read.routes.text.tokenizer import TOKENIZER
from moe_trace.show.routes_page import render_routes_page
from paths import DATA

from .harness import SCREENSHOTS, tensorboard
from .moe_tab import Watch, accessibility_problems, open_view, undrawn_plots
from .routes_made import BYTE_OFFSET, LAYERS, SLOTS, expert, make_routes

pytestmark = pytest.mark.browser

HOSTILE = (
    "<script>window.owned=1</script>\"'&amp;<img src=x onerror=window.owned=1>"
    "\r\n\t\0\u202egnp.exe\u202c\u200b"
)
TRAIN = "train_grouped_mm.pt.trace.json.gz"


def write_page(folder: Path, routes: RecordedRoutes, tokenizer: str | None = "demo") -> Path:
    """As the command line writes it."""
    file = folder / "routes.html"
    save_routes(routes, folder / "hand.routes.npz")
    chosen = ["--tokenizer", tokenizer] if tokenizer else []
    assert main(["routes", "view", str(folder / "hand.routes.npz"), "-o", str(file), *chosen]) == 0
    return file


def open_page(
    browser: Browser, file: Path, *, theme: Any = "light", width: int = 1400
) -> tuple[Page, list[str]]:
    context = browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=theme, offline=True)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or problems.append(r.url))
    page.goto(file.as_uri())
    page.wait_for_function("document.querySelectorAll('.tokens .token').length > 0")
    return page, problems


def shot(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    (SCREENSHOTS / f"routes_{name}.png").write_bytes(page.screenshot())


def slide(place: Page | Frame, label: str, value: int) -> None:
    slider = place.locator(f".token-view label:text-is('{label}') + input")
    slider.evaluate("(s, v) => { s.value = v; s.dispatchEvent(new Event('input')); }", value)


def words(cells: Locator) -> list[str]:
    return cells.all_inner_texts()


def chips_of_path(place: Page | Frame) -> list[list[str]]:
    """Per layer what the panel of a token's path shows."""
    rows = place.locator(".path-panel tr").all()
    return [[cell.inner_text() for cell in row.locator("td").all()] for row in rows]


def colours(cells: Locator) -> list[str]:
    return list(cells.evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)"))


# -- the page -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    routes = make_routes([*DEMO_PROMPTS.values(), "aab"])
    routes.expert_ids[-1, 1, 1] = routes.no_expert  # the last "b"
    return write_page(tmp_path_factory.mktemp("text"), routes)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_sliders_hover_and_experts(browser: Browser, text_page: Path, theme: str) -> None:
    page, problems = open_page(browser, text_page, theme=theme)
    slide(page, "Page", 1)
    expect(page.locator(".text-label").last).to_have_text("step 0, sequence 4, prefill")
    last = page.locator(".tokens .text").last.locator(".token:not(.padding)")
    assert words(last) == ["a", "a", "b"]
    ids = [byte + BYTE_OFFSET for byte in b"aab"]

    same = colours(last)
    assert same[0] == same[1] != same[2], "one colour an expert"
    slide(page, "Slot", 1)
    assert colours(last)[0] != same[0], "another slot, another expert"
    slide(page, "Layer", 1)
    expect(last.nth(2)).to_have_class(re.compile(r"\bnone\b"))
    assert "no expert in this slot (1)" in page.locator(".keys").inner_text()

    last.nth(1).hover()
    weights = ("0.63", "0.25")
    expected = [[f"{expert(ids[1], layer, s)}{weights[s]}" for s in range(SLOTS)] for layer in range(LAYERS)]
    assert chips_of_path(page) == expected
    assert f"token id {ids[1]}" in page.locator(".path-panel").inner_text()
    last.nth(2).hover()
    assert chips_of_path(page)[1][1] == "skipped"
    shot(page, f"hover_{theme}")

    slide(page, "Layer", 0)
    slide(page, "Slot", 0)
    chosen = expert(ids[0], 0, 0)
    page.locator(".expert-chip").nth(chosen).click()
    plain = page.locator(".tokens .token:not(.padding):not(.dim)")
    shown = [page.evaluate("c => c.codePointAt(0)", word[0]) for word in words(plain) if len(word) == 1]
    assert shown and all(
        chosen in [expert(code + BYTE_OFFSET, 0, s) for s in range(SLOTS)] for code in shown if code < 128
    )
    got = page.locator(".got-panel")
    assert f"Expert {chosen} of L00" in got.inner_text()
    got.locator("button.mention").last.click()
    assert page.locator(".token.current").count() == 1
    shot(page, f"expert_{theme}")
    page.locator(".expert-chip").nth(chosen).click()
    assert not got.is_visible()
    assert problems == []
    page.context.close()


def test_the_legend_counts_as_the_routes_do(browser: Browser, text_page: Path) -> None:
    page, problems = open_page(browser, text_page)
    routes = make_routes([*DEMO_PROMPTS.values(), "aab"])
    counts = routes[~routes.padding].assignments()
    slide(page, "Layer", 2)
    titles = page.locator(".expert-chip").evaluate_all("all => all.map(e => e.title)")
    assert [int(re.findall(r": ([\d,]+) ", title)[0].replace(",", "")) for title in titles] == counts[
        2
    ].tolist()
    assert problems == []
    page.context.close()


def test_keyboard_alone(browser: Browser, text_page: Path) -> None:
    page, problems = open_page(browser, text_page)
    page.locator(".tokens").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    assert "Position 10" in page.locator(".path-panel").inner_text()
    assert page.locator(".token.current").inner_text() == DEMO_PROMPTS["prose"][10]
    assert accessibility_problems(page.main_frame) == []
    assert problems == []
    page.context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_hostile_text_is_shown_as_text(browser: Browser, tmp_path: Path, theme: str) -> None:
    routes = make_routes([HOSTILE, "a"])
    routes = replace(routes, model={"name": HOSTILE}, layers=(HOSTILE, "b.1", "c.2"))
    page, problems = open_page(browser, write_page(tmp_path, routes), theme=theme)
    shown = "".join(words(page.locator(".tokens .text").first.locator(".token")))
    assert shown.startswith("<script>window.owned=1</script>\"'&amp;<img src=x")
    assert "⟨U+000D⟩⏎⇥⟨U+0000⟩" in shown, "controls by name"
    assert "\u202e" not in shown and "\u200b" not in shown
    page.locator(".tokens .token").nth(3).hover()
    page.locator(".expert-chip").nth(1).click()
    assert page.evaluate("window.owned") is None
    assert page.locator("#main img").count() == 0
    shot(page, f"hostile_{theme}")
    assert problems == []
    page.context.close()


def test_unseen_characters_of_one_token_have_names(browser: Browser, tmp_path: Path) -> None:
    """A vocabulary whose tokens are hostile by themselves."""
    vocabulary = tmp_path / "vocab.json"
    pieces = ["\u202e", "\u200b", "\ufeff", "</script>", "\u2066x\u2069", "\ue000", "fine"]
    vocabulary.write_text(json.dumps(pieces))
    routes = make_routes(["abcdefg"])
    routes = replace(routes, token_ids=np.arange(7, dtype=np.int32))
    file = write_page(tmp_path, routes, str(vocabulary))
    page, problems = open_page(browser, file)
    assert words(page.locator(".tokens .token")) == [
        "⟨U+202E⟩", "⟨U+200B⟩", "⟨U+FEFF⟩", "</script>", "⟨U+2066⟩x⟨U+2069⟩", "⟨U+E000⟩", "fine",
    ]  # fmt: skip
    assert problems == []
    page.context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_without_text_positions_stand_for_tokens(browser: Browser, tmp_path: Path, theme: str) -> None:
    prompts = list(DEMO_PROMPTS.values())
    routes = make_routes(prompts, text=False)
    file = write_page(tmp_path, routes)
    assert prompts[0][:20] not in file.read_text(encoding="utf-8")
    page, problems = open_page(browser, file, theme=theme)
    first = page.locator(".tokens .text").first.locator(".token:not(.padding)")
    assert words(first)[:4] == ["0", "1", "2", "3"]
    assert "was not recorded" in page.locator("main").inner_text()
    page.locator(".expert-chip").nth(2).click()
    first.nth(5).click()
    assert "Position 5" in page.locator(".path-panel").inner_text()
    shot(page, f"positions_{theme}")
    assert problems == []
    page.context.close()


def test_a_hundred_thousand_tokens_do_not_freeze_the_page(browser: Browser, tmp_path: Path) -> None:
    """OLMoE's size: 16 layers, top 8 of 64."""
    tokens, rng = 100_000, np.random.default_rng(0)
    routes = RecordedRoutes(
        expert_ids=rng.integers(0, 64, (tokens, 16, 8)).astype(np.uint8),
        layers=tuple(f"model.layers.{i}.mlp.gate" for i in range(16)),
        num_experts=(64,) * 16,
        top_k=(8,) * 16,
        padding=np.zeros(tokens, bool),
        step=np.arange(tokens) // 4096,
        forward=np.arange(tokens) // 4096,
        sequence=(np.arange(tokens) // 1024 % 4).astype(np.int32),
        position=(np.arange(tokens) % 1024).astype(np.int32),
        stage_codes=np.full(tokens, 2, np.uint8),
    )
    file = tmp_path / "large.html"
    file.write_text(render_routes_page(routes, label="large"), encoding="utf-8")
    assert file.stat().st_size < 30e6
    page, problems = open_page(browser, file)
    assert page.locator(".tokens .token").count() <= 2048
    for value in (10, 30, 48):
        slide(page, "Page", value)
    expect(page.locator(".token-view output").first).to_have_text("49 of 49")
    page.locator(".expert-chip").nth(3).click()
    began = time.monotonic()
    for layer in range(16):
        slide(page, "Layer", layer)
    assert time.monotonic() - began < 30, "two seconds a layer would be a frozen page"
    shot(page, "large")
    assert problems == []
    page.context.close()


def test_the_figures_of_the_study_are_drawn(browser: Browser, text_page: Path) -> None:
    page, problems = open_page(browser, text_page, width=1000)
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length >= 5")
    keys = page.locator("figure h3").all_inner_texts()
    assert keys == [
        "Experts chosen together",
        "From layer to layer",
        "Experts of the token before",
        "Distinct experts of a batch",
        "Experts at hand in a cache",
    ]
    before = page.locator("#routes0-coactivation").evaluate("e => JSON.stringify(e.data[0].z)")
    page.locator("#routes0-coactivation-step").evaluate(
        "s => { s.value = 2; s.dispatchEvent(new Event('input')); }"
    )
    assert page.locator("#routes0-coactivation-label").inner_text() == "L02"
    assert page.locator("#routes0-coactivation").evaluate("e => JSON.stringify(e.data[0].z)") != before
    page.locator("figure").first.scroll_into_view_if_needed()
    shot(page, "figures")
    assert problems == []
    page.context.close()


# -- the tab --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    logs = tmp_path_factory.mktemp("logs")
    for run in ("with", "without", "broken"):
        (logs / run).mkdir()
        shutil.copy(DATA / "h200" / TRAIN, logs / run)
    stem = TRAIN.removesuffix(".pt.trace.json.gz")
    save_routes(make_routes([*DEMO_PROMPTS.values(), HOSTILE]), logs / "with" / f"{stem}.routes.npz")
    (logs / "broken" / f"{stem}.routes.npz").write_bytes(b"PK\x03\x04 no routes")
    os.environ[TOKENIZER] = "demo"
    try:
        with tensorboard(logs, tmp_path_factory.mktemp("scratch")) as url:
            yield url
    finally:
        del os.environ[TOKENIZER]


@pytest.fixture
def watch(page: Page) -> Iterator[Watch]:
    found = Watch()
    found.attach(page)
    yield found
    assert found.errors == []
    assert found.outside == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_tab_shows_the_same(page: Page, watch: Watch, board: str, theme: str) -> None:
    page.goto(board)
    page.evaluate(f"localStorage.setItem('_tb_global_settings', JSON.stringify({{theme: '{theme}'}}))")
    frame = open_view(page, board, "routes", run="with", site="L01", expert=3)
    assert frame.locator("nav [aria-current]").inner_text() == "Tokens"
    assert undrawn_plots(frame) == []
    assert frame.locator(".expert-chip[aria-pressed=true]").inner_text() == "3"
    cells = frame.locator(".tokens .text").first.locator(".token:not(.padding)")
    prompt = DEMO_PROMPTS["prose"]
    assert "".join(words(cells)).replace("⏎", "\n") == prompt
    cells.nth(30).hover()
    token_id = ord(prompt[30]) + BYTE_OFFSET
    assert [[cell.split("0.")[0] for cell in row] for row in chips_of_path(frame)] == [
        [str(expert(token_id, layer, s)) for s in range(SLOTS)] for layer in range(LAYERS)
    ]
    assert accessibility_problems(frame) == []
    shot(page, f"tab_{theme}")
    slide(frame, "Page", 1)
    expect(frame.locator(".token-view output").first).to_have_text(re.compile("^2 of "))
    page.wait_for_url(re.compile("p[.]moe[.]page=1"))
    frame.locator(".study").scroll_into_view_if_needed()
    shot(page, f"tab_study_{theme}")


def test_the_tab_says_what_is_missing_or_broken(page: Page, watch: Watch, board: str) -> None:
    frame = open_view(page, board, "overview", run="without")
    assert "Tokens" not in frame.locator("nav").inner_text()
    frame = open_view(page, board, "routes", run="without")
    assert "no file of routes" in frame.locator("main").inner_text()
    frame = open_view(page, board, "routes", run="broken")
    assert "cannot be read" in frame.locator("main").inner_text()

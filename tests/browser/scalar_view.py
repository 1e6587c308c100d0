"""Read TensorBoard's scalar dashboard: groups of charts, each open or closed, in pages of twelve."""

from __future__ import annotations

import json
from collections.abc import Collection
from urllib.request import urlopen

from playwright.sync_api import Locator, Page

from .harness import START_TIMEOUT_S, wait_until


def open_scalars(page: Page, url: str, run: str, tags: Collection[str]) -> None:
    """Opens the dashboard once TensorBoard has read `tags` of `run`: the page does not take in later ones."""

    def loaded() -> bool:
        with urlopen(f"{url}/data/plugin/scalars/tags", timeout=START_TIMEOUT_S) as answer:
            return set(tags) <= set(json.load(answer).get(run, ()))

    wait_until(loaded, f"TensorBoard to read {len(tags)} scalars of the run {run!r}")
    page.goto(f"{url}/#scalars")
    _groups(page).first.wait_for()


def shown_tags(page: Page) -> set[str]:
    """Opens every group of the dashboard, leafs through its pages, and gives the tags of all charts."""
    return {tag for group in _groups(page).all() for tag in _tags_of(group)}


def _groups(page: Page) -> Locator:
    """The groups that hold a chart. The first on the page is an empty one, for the tag filter."""
    return page.locator("tf-category-paginated-view").filter(has=page.locator("button.heading"))


def _tags_of(group: Locator) -> set[str]:
    if group.locator(".iron-collapse-closed").count():
        group.locator("button.heading").click()
    tags = _tags_on_page(group)
    forward = group.get_by_role("button", name="Next page").first
    while forward.count() and forward.is_enabled():
        before = _tags_on_page(group)
        forward.click()
        tags |= wait_until(lambda before=before: _tags_on_page(group) - before, "the next page of charts")
    return tags


def _tags_on_page(group: Locator) -> set[str]:
    headings = group.locator("[itemprop=tag]")
    headings.first.wait_for()
    return set(headings.all_inner_texts())

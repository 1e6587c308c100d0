"""One Chromium for each test module: while it runs, playwright holds the event loop of the test process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from .harness import Internet, chromium, find_chromium, offline_context

MISSING = (
    "found no Chromium, which the browser tests drive. "
    "On Debian, as root: apt-get install chromium fonts-liberation (scripts/test.sh does it where it can)"
)


def require_chromium() -> str:
    """The path of Chromium. Without one the test is skipped; in CI, where nobody sees a skip, it fails."""
    found = find_chromium()
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium(require_chromium()) as running:
        yield running


@pytest.fixture
def page(browser: Browser, internet: Internet) -> Iterator[Page]:
    """An empty page of a fresh browser profile. Afterwards nothing may have asked for an unknown address."""
    with offline_context(browser, internet) as context:
        yield context.new_page()
    assert internet.refused == [], "the page asked the internet for more than the two known scripts"


@pytest.fixture
def internet() -> Internet:
    """What answers the page in place of the internet."""
    return Internet()

"""Start TensorBoard, and a Chromium that can only reach this machine.

    with tensorboard(logdir, scratch) as url, chromium(executable) as browser:
        with offline_context(browser, Internet()) as context:
            page = context.new_page()
            page.goto(url)

The pages of torch-tb-profiler request two scripts from the internet. Both are served from here. Every other
request that would leave the machine is refused and recorded, so that a test can assert that there was none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import urlopen

from playwright.sync_api import Browser, BrowserContext, Request, Route, sync_playwright

import moe_trace.show.viewer

T = TypeVar("T")

VENDOR = Path(__file__).parent / "vendor"
POLYFILL = Path(moe_trace.show.viewer.__file__).with_name("webcomponents.min.js")
SCREENSHOTS = Path(__file__).parent / "screenshots"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_FLAGS = (
    "--no-sandbox",  # the sandbox does not start as root, which CI is
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
VIEWPORT = {"width": 1600, "height": 1000}
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 10.0
PAGE_TIMEOUT_MS = 60_000
POLL_S = 0.05

# The profiler's pages use a dozen chart classes. This stands for them all: it answers every question with
# itself, and draws nothing.
CHARTS_STUB = """
(() => {
  const anything = new Proxy(function () {}, {
    get: (_, name) => (name === Symbol.toPrimitive ? () => 0 : anything),
    apply: () => anything,
    construct: () => anything,
  });
  window.google = {
    charts: {load() {}, setOnLoadCallback(callback) { setTimeout(callback); }},
    visualization: anything,
  };
})();
"""


def find_chromium() -> str | None:
    """The path of an installed Chromium or Chrome."""
    return next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)


def wait_until(ask: Callable[[], T | None], what: str, *, timeout_s: float = START_TIMEOUT_S) -> T:
    """The first true answer to `ask`; TimeoutError naming `what` if there is none in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if answer := ask():
            return answer
        time.sleep(POLL_S)
    raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")


@contextmanager
def tensorboard(logdir: Path | None, scratch: Path, *flags: str) -> Iterator[str]:
    """A TensorBoard of its own for `logdir`, or for what the flags say; its URL, without a slash at the end.

    TensorBoard chooses the port itself and prints it, so no other process can take it in between. What it
    writes goes to `scratch`.
    """
    log = scratch / "tensorboard.log"
    # -P: an old moe_trace.egg-info in the checkout would hide the entry points of the installed package.
    command = [sys.executable, "-P", "-m", "tensorboard.main", "--load_fast=false"]
    command += ["--logdir", str(logdir)] if logdir is not None else []
    command += ["--host=127.0.0.1", "--port=0", "--reload_interval=1", *flags]
    with log.open("wb") as output:
        # A session of its own: the profiler plugin starts processes to parse traces, and they must end too.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
    try:
        yield wait_until(lambda: _announced_url(process, log), "TensorBoard to print its address")
    finally:
        _stop_group(process)


def _announced_url(process: subprocess.Popen[bytes], log: Path) -> str | None:
    text = log.read_text(errors="replace")
    if process.poll() is not None:
        raise RuntimeError(f"TensorBoard ended with status {process.returncode}:\n{text}")
    found = re.search(r"http://127\.0\.0\.1:\d+", text)
    return found[0] if found else None


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            continue


def wait_for_run(url: str, run: str) -> None:
    """Waits until torch-tb-profiler has read the traces of `run`; until then its page knows nothing of it."""

    def loaded() -> bool:
        with urlopen(f"{url}/data/plugin/pytorch_profiler/runs", timeout=START_TIMEOUT_S) as answer:
            return run in json.load(answer)["runs"]

    wait_until(loaded, f"torch-tb-profiler to load the run {run!r}")


class Internet:
    """Answers in place of the internet, and remembers what it could not answer."""

    def __init__(self) -> None:
        self.refused: list[str] = []
        polyfill = POLYFILL.read_text()
        self._scripts = {"/webcomponents.min.js": polyfill, "/charts/loader.js": CHARTS_STUB}

    @staticmethod
    def is_outside(url: str) -> bool:
        """Whether a request for `url` would leave this machine."""
        parts = urlsplit(url)
        return parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in LOOPBACK_HOSTS

    def answer(self, route: Route, request: Request) -> None:
        path = urlsplit(request.url).path
        for ending, script in self._scripts.items():
            if path.endswith(ending):
                return route.fulfill(body=script, content_type="text/javascript")
        self.refused.append(request.url)
        return route.abort()


@contextmanager
def chromium(executable: str) -> Iterator[Browser]:
    """A headless Chromium. While it runs, playwright holds the event loop of this thread."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, headless=True, args=CHROMIUM_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def offline_context(browser: Browser, internet: Internet) -> Iterator[BrowserContext]:
    """A fresh browser profile whose requests to the outside go to `internet`."""
    context = browser.new_context(viewport=VIEWPORT)
    context.set_default_timeout(PAGE_TIMEOUT_MS)
    context.route(internet.is_outside, internet.answer)
    try:
        yield context
    finally:
        context.close()

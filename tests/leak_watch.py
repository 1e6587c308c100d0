"""Find what a test left behind: threads, open profiler ranges, and hooks of moe_trace on modules.

This module never imports torch, so tests of reading traces stay free of it. Ranges and hooks are checked from
the first test that starts with torch imported. The test that imports torch first is only checked for threads.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

OUR_PACKAGE = "moe_trace"
# Threads that these modules start once and keep for the life of the process, whoever asked first.
LIFELONG_THREADS = ("tqdm.", "torch._inductor.")
JOIN_GRACE_S = 2.0


def origin(function: Any) -> str:
    """The module that a hook comes from, seen through partials, bound methods and callable objects."""
    if isinstance(function, functools.partial):
        return origin(function.func)
    module = getattr(function, "__module__", None) or type(function).__module__
    return str(module)


def thread_origin(thread: threading.Thread) -> str:
    """The module whose code a thread runs: that of its class, or that of its target for a plain Thread."""
    if type(thread).__module__ != "threading":
        return type(thread).__module__
    return origin(getattr(thread, "_target", None))


def new_threads(before: set[threading.Thread], *, grace_s: float = JOIN_GRACE_S) -> list[threading.Thread]:
    """Threads that live now and did not before, once they had `grace_s` seconds in all to end."""
    deadline = time.monotonic() + grace_s
    left = []
    for thread in set(threading.enumerate()) - before - {threading.current_thread()}:
        if thread_origin(thread).startswith(LIFELONG_THREADS):
            continue
        if isinstance(thread, threading._DummyThread):
            continue  # a thread of C++, such as autograd's, that ran some Python: it ends with the process
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            left.append(thread)
    return left


class LeakWatch:
    """Watches test after test: `start()` before each, `problems()` after it, `uninstall()` at the end."""

    def __init__(self) -> None:
        self._threads: set[threading.Thread] = set()
        self._hook_dicts: list[dict[int, Any]] = []
        self._open_ranges: dict[int, Any] = {}
        self._undo: list[Callable[[], None]] = []

    def start(self) -> None:
        """Forgets the test before, and notes what is there now."""
        self._watch_torch()
        self._threads = set(threading.enumerate())
        self._hook_dicts.clear()
        self._open_ranges.clear()

    def problems(self) -> list[str]:
        """One sentence for each thing that the test left behind; it is then forgotten."""
        found = [f"thread {t.name!r} of {thread_origin(t)} still runs" for t in new_threads(self._threads)]
        found += [f"range {getattr(r, 'name', r)!r} is still open" for r in self._open_ranges.values()]
        self._remove_muted()
        found += [f"hook {hook!r} is still registered" for hook in self._our_hooks()]
        found += [f"{owner.__name__}.{name} of torch is still wrapped" for owner, name in self._our_wraps()]
        self._hook_dicts.clear()
        self._open_ranges.clear()
        return found

    def uninstall(self) -> None:
        """Gives torch its own functions back."""
        while self._undo:
            self._undo.pop()()

    def _our_hooks(self) -> Iterator[Any]:
        for hooks in self._hook_dicts:
            yield from (h for h in hooks.values() if origin(h).split(".")[0] == OUR_PACKAGE)

    @staticmethod
    def _remove_muted() -> None:
        """Those that stay on a compiled model on purpose, and go when they are asked to."""
        muted = sys.modules.get(f"{OUR_PACKAGE}.record.muted")
        if muted is not None:
            muted.remove_all()

    def _our_wraps(self) -> Iterator[tuple[type, str]]:
        sessions = sys.modules.get(f"{OUR_PACKAGE}.record.sessions")
        for owner, name in sessions._BEGINNINGS if sessions else ():
            if getattr(owner.__dict__[name], "__globals__", {}) is vars(sessions):
                yield owner, name

    def _watch_torch(self) -> None:
        torch = sys.modules.get("torch")
        if torch is None or self._undo:
            return
        self._watch_hooks(torch)
        self._watch_ranges(torch)

    def _watch_hooks(self, torch: ModuleType) -> None:
        """Keeps every dict of hooks that something is put into during the test.

        Every kind of hook makes a RemovableHandle for its dict. The dict is kept, not the module: once the
        hooks are gone it keeps nothing alive, and until then they are found even if the model itself died.
        """
        handle = torch.utils.hooks.RemovableHandle
        original = handle.__init__

        def init(self_: Any, hooks_dict: Any, **options: Any) -> None:
            self._hook_dicts.append(hooks_dict)
            original(self_, hooks_dict, **options)

        self._replace(handle, "__init__", init)

    def _watch_ranges(self, torch: ModuleType) -> None:
        ranges = torch.autograd.profiler.record_function
        enter, leave = ranges.__enter__, ranges.__exit__

        def enter_watched(self_: Any) -> Any:
            self._open_ranges[id(self_)] = self_
            return enter(self_)

        def leave_watched(self_: Any, *exception: Any) -> Any:
            self._open_ranges.pop(id(self_), None)
            return leave(self_, *exception)

        self._replace(ranges, "__enter__", enter_watched)
        self._replace(ranges, "__exit__", leave_watched)

    def _replace(self, owner: Any, name: str, new: Callable[..., Any]) -> None:
        old = getattr(owner, name)
        setattr(owner, name, functools.wraps(old)(new))
        self._undo.append(lambda: setattr(owner, name, old))

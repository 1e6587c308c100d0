"""Tests that the fixture that guards all other tests can fail."""

from __future__ import annotations

import functools
import threading
from types import SimpleNamespace

import pytest

from leak_watch import JOIN_GRACE_S, LeakWatch, new_threads, origin
from paths import TESTS

pytest_plugins = ["pytester"]

CARELESS_TESTS = """
import functools
import threading

import torch
from torch.profiler import record_function


def hook(module, args, output):
    return None


class Hooks:
    def pre_hook(self, module, args):
        return None


hook.__module__ = Hooks.pre_hook.__module__ = "moe_trace.record.hooks.site"


def foreign_hook(module, args, output):
    return None


def test_clean():
    handle = torch.nn.Linear(2, 2).register_forward_hook(hook)
    with record_function("closed"):
        handle.remove()
    thread = threading.Thread(target=int)
    thread.start()


def test_foreign_hook():
    torch.nn.Linear(2, 2).register_forward_hook(foreign_hook)


def test_hook():
    torch.nn.Linear(2, 2).register_forward_hook(functools.partial(hook))  # the module dies here


def test_pre_hook():
    torch.nn.Linear(2, 2).register_forward_pre_hook(Hooks().pre_hook)


def test_global_hook():
    torch.nn.modules.module.register_module_forward_hook(hook)


def test_range():
    record_function("left open").__enter__()


def test_thread():
    threading.Thread(target=threading.Event().wait, name="left running", daemon=True).start()
"""


def test_fixture_names_what_a_test_left_behind(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a process of its own: what these tests leave behind must not reach the fixture round this one.
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("COLUMNS", "300")  # so that the summary lines are whole
    pytester.makeconftest((TESTS / "conftest.py").read_text())
    pytester.makepyfile(CARELESS_TESTS)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "ignore")
    result.assert_outcomes(passed=7, errors=5)
    result.stdout.fnmatch_lines_random(
        [
            "ERROR *::test_hook - *hook *",
            "ERROR *::test_pre_hook - *hook *",
            "ERROR *::test_global_hook - *hook *",
            "ERROR *::test_range - *'left open'*",
            "ERROR *::test_thread - *'left running'*",
        ]
    )


def test_thread_gets_a_moment_to_end() -> None:
    before = set(threading.enumerate())
    release = threading.Event()
    thread = threading.Thread(target=release.wait, args=(10 * JOIN_GRACE_S,))
    thread.start()
    assert new_threads(before, grace_s=0.0) == [thread]
    release.set()
    assert new_threads(before) == []


def test_lifelong_threads_of_libraries_are_no_leak() -> None:
    release = threading.Event()

    class Monitor(threading.Thread):
        __module__ = "tqdm._monitor"

        def run(self) -> None:
            release.wait()

    before = set(threading.enumerate())
    thread = Monitor()
    thread.start()
    try:
        assert new_threads(before, grace_s=0.0) == []
    finally:
        release.set()
        thread.join()


def test_origin_sees_through_wrappers() -> None:
    watch = LeakWatch()
    assert origin(watch.start) == "leak_watch"
    assert origin(functools.partial(functools.partial(watch.start))) == "leak_watch"
    assert origin(watch) == "leak_watch"


def test_files_that_begin_first_exist_and_do(request: pytest.FixtureRequest) -> None:
    conftest = request.config.pluginmanager.get_plugin(str(TESTS / "conftest.py"))
    assert conftest is not None
    assert [name for name in conftest.LONG if not (TESTS / name).is_file()] == []
    files = [TESTS / "test_docs.py", TESTS / "test_x.py", TESTS / conftest.LONG[0], TESTS / "test_a.py"]
    items = [SimpleNamespace(path=path) for path in files]
    conftest.pytest_collection_modifyitems(items)
    assert [item.path for item in items] == [files[2], files[0], files[1], files[3]]


def test_hub_is_offline() -> None:
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE

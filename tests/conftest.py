"""Rules of every test: no network, no GPU test without a GPU, and nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fork_server import ForkServer
from leak_watch import LeakWatch

# Read when huggingface_hub is imported, so set before any test module is. The children of tests inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# The models are tiny: threads that wait for each other at every operator cost more than they save, and on a
# busy machine several times the test's own time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor's pool of compilers outlives the test that started it.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Without a GPU our Triton kernels run in its interpreter, which it must know before it is imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Minutes each, the longest first: they begin before all else, so that none is left alone at the end.
LONG = (
    "record/test_compiled.py",
    "browser/test_dashboard.py",
    "browser/test_matrix.py",
    "cli/test_cli_script.py",
    "cli/test_every_command.py",
    "test_docs.py",
    "record/test_muted.py",
    "read/test_compiled_cpu.py",
    "record/test_routes_compiled.py",
    "distributed/test_run.py",
    "distributed/test_modes.py",
    "cli/test_cli_run.py",
    "find/test_families.py",
    "record/test_told_tokens.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By file, the long ones first; else as they were collected."""
    tests = Path(__file__).parent
    place = {tests / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None:
        return
    import torch  # only here: most tests of the reading half need no torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def leak_watch() -> Iterator[LeakWatch]:
    watch = LeakWatch()
    yield watch
    watch.uninstall()


@pytest.fixture(autouse=True)
def nothing_left_behind(leak_watch: LeakWatch) -> Iterator[None]:
    """After every test no new thread runs, no range is open, and no hook of moe_trace is on any module."""
    leak_watch.start()
    yield
    left = leak_watch.problems()
    assert not left, "the test left behind: " + "; ".join(left)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Runs programs that need torch and are not about its import."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """One thread, and nothing compiled that another test left."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)

"""Add the tested versions to the report of a run, for the table of `scripts/test_versions.py`."""

from __future__ import annotations

import platform
from collections.abc import Callable

import pytest
import torch
import transformers


@pytest.fixture(scope="session", autouse=True)
def versions_in_the_report(record_testsuite_property: Callable[[str, object], None]) -> None:
    record_testsuite_property("Python", platform.python_version())
    record_testsuite_property("torch", torch.__version__)
    record_testsuite_property("transformers", transformers.__version__)

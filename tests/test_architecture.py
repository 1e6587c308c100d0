"""The direction of imports: the reading half never reaches torch, and modules import one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from paths import ROOT

PACKAGE = ROOT / "moe_trace"

# What the files of each folder may import of the others. A folder that is not listed may import all.
ALLOWED = {
    "data": set(),
    "find": {"data"},
    "timeline": {"data"},
    "record": {"find", "data", "timeline", "integrations"},
    "read": {"data", "timeline", "show"},
    "placement": {"read", "data"},
    "show": {"read", "placement", "data", "timeline", "simple"},
    "simple": {"record", "find", "data", "show"},
    "routing": {"record", "find", "data", "simple"},
}
READING_COMMANDS = {"check", "diff", "export", "merge", "placement", "reading", "report", "view"}
NO_TORCH = {"data", "timeline", "read", "placement", "show"}
ON_TOP = {part.name.removesuffix(".py") for part in PACKAGE.iterdir()}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(source: str, *, also_for_types: bool = False) -> set[str]:
    """Every module that the source imports anywhere, functions included, but not for type checking only."""
    tree = ast.parse(source)
    skipped = set() if also_for_types else {id(n) for block in _type_checking(tree) for n in ast.walk(block)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _type_checking(tree: ast.Module) -> list[ast.If]:
    return [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.If) and isinstance(n.test, ast.Name) and n.test.id == "TYPE_CHECKING"
    ]


def own_parts(modules: set[str]) -> set[str]:
    parts = {m.split(".")[1] for m in modules if m.startswith("moe_trace.")}
    return {part for part in parts if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()}


def violations(path: Path, source: str) -> set[str]:
    part = part_of(path)
    modules = imported_modules(source)
    wrong = own_parts(modules) - ALLOWED.get(part, ON_TOP) - {part}
    if part in NO_TORCH or (part == "cli" and path.stem in READING_COMMANDS):
        wrong |= {m for m in modules if m.split(".")[0] in ("torch", "transformers")}
    return wrong


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    assert violations(path, path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("data/loads.py", "import torch", {"torch"}),
        ("show/text.py", "def f():\n    from torch import nn", {"torch", "torch.nn"}),
        ("data/schema.py", "from moe_trace.record.tracer import MoETracer", {"record"}),
        ("timeline/merge.py", "import moe_trace.read.reader", {"read"}),
        ("record/reduce/stats.py", "from moe_trace import cli", {"cli"}),
    ],
)
def test_the_test_of_imports_can_fail(name: str, source: str, found: set[str]) -> None:
    assert violations(PACKAGE / name, source) == found


def loaded_modules(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import moe_trace",
        "import moe_trace; moe_trace.read_summary; moe_trace.merge_into; moe_trace.Summary",
        "import moe_trace.cli\ntry: moe_trace.cli.main(['report', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_reading_never_loads_torch(code: str) -> None:
    assert "torch" not in loaded_modules(code)


def test_the_test_of_loading_can_fail() -> None:
    assert "torch" in loaded_modules("import moe_trace; moe_trace.MoETracer")

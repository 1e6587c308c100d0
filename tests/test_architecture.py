"""The direction of imports: the reading half never reaches torch, and modules import one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "moe_trace"

# What each part may import of moe_trace. Parts that are not listed may import nothing of it.
VOCABULARY = {"errors", "schema", "files", "loads"}
READING = VOCABULARY | {
    "codec",
    "figure",
    "figures",
    "figures_decisions",
    "figures_latency",
    "figures_load",
    "figures_ranks",
    "figures_routing",
    "figures_time",
    "figures_timeline",
    "placement",
    "reader",
    "reading",
    "render",
    "router_metrics",
    "summary",
    "summary_notes",
    "timeline",
}
RECORDING = READING | {
    "batch",
    "call_record",
    "contracts",
    "compiled",
    "cuda_driver",
    "device_clock",
    "environment",
    "flops",
    "forwards",
    "fused_stats",
    "graph_capture",
    "graph_forwards",
    "graph_hooks",
    "graph_memory",
    "graph_recorder",
    "graph_ring",
    "graph_rings",
    "graph_shipment",
    "hook_levels",
    "hooks",
    "load_image",
    "meshes",
    "model_hooks",
    "parallel",
    "pinned",
    "profiler",
    "ranges",
    "recorder",
    "reduction",
    "retired",
    "routers",
    "scalars",
    "sending",
    "stats",
    "steps",
    "streams",
    "tracer",
}
ON_TOP = RECORDING | {
    "benchmark",
    "comparison",
    "demo",
    "integrations",
    "model_state",
    "routing",
    "scalar_logger",
    "simple",
    "workload",
}
READING_COMMANDS = {"check", "diff", "export", "merge", "placement", "reading", "report", "view"}
FIGURES = {part for part in READING if part.startswith("figure")}
ALLOWED = {
    "errors": set(),
    "schema": set(),
    "demo": set(),
    "files": {"errors"},
    "loads": set(),
    "codec": {"errors", "schema"},
    "summary": {"errors", "loads", "schema", "summary_notes"},
    "summary_notes": {"schema"},
    "router_metrics": {"errors", "loads", "schema"},
    "timeline": VOCABULARY | {"codec"},
    "placement": VOCABULARY | {"reader", "reading"},
    "reading": READING - FIGURES - {"placement"},  # render: for `_repr_html_` alone, when a notebook asks
    "reader": READING - {"placement", "render"} - FIGURES,
    **dict.fromkeys(FIGURES, READING),
    "figure": set(),
    "tensorboard_plugin": READING,
    "render": READING,
    "contracts": {"errors", "schema"},
    "flops": {"contracts", "schema"},
    "routers": {"contracts", "errors", "flops", "meshes", "schema"},
    "meshes": {"contracts"},
    "parallel": {"contracts", "environment", "meshes", "schema", "sending"},
    "sending": {"stats"},
    "stats": set(),
    "steps": set(),
    "streams": set(),
    "ranges": set(),
    "retired": set(),
    "environment": {"contracts", "routers", "schema"},
    "device_clock": {"schema"},
    "call_record": {"contracts", "routers", "schema", "sending"},
    "batch": {"call_record", "schema", "sending", "stats"},
    "fused_stats": {"stats"},
    "reduction": {"batch", "call_record", "fused_stats", "sending", "stats"},
    "pinned": set(),
    "recorder": {"batch", "call_record", "contracts", "pinned", "ranges", "reduction", "schema", "streams"},
    "compiled": set(),
    "graph_ring": {"contracts", "schema", "stats"},
    "cuda_driver": set(),
    "graph_memory": {"cuda_driver"},
    "graph_capture": {"cuda_driver", "schema"},
    "graph_forwards": {"call_record", "graph_ring", "pinned", "schema"},
    "graph_rings": {"contracts", "graph_forwards", "graph_memory", "graph_ring", "routers", "schema"},
    "graph_shipment": {"graph_ring", "pinned"},
    "graph_recorder": {
        "call_record",
        "graph_forwards",
        "graph_memory",
        "graph_ring",
        "graph_rings",
        "graph_shipment",
        "recorder",
        "routers",
        "schema",
    },
    "graph_hooks": {"contracts", "graph_rings", "routers"},
    "forwards": {"schema"},
    "hooks": {
        "graph_capture",
        "graph_memory",
        "call_record",
        "compiled",
        "contracts",
        "forwards",
        "graph_hooks",
        "graph_rings",
        "ranges",
        "recorder",
        "retired",
        "routers",
        "schema",
        "sending",
    },
    "hook_levels": {"hooks"},
    "model_hooks": {
        "compiled",
        "forwards",
        "graph_capture",
        "graph_forwards",
        "graph_recorder",
        "graph_ring",
        "hook_levels",
        "hooks",
        "ranges",
        "recorder",
        "retired",
        "routers",
        "schema",
        "sending",
        "steps",
    },
    "tracer": RECORDING - {"scalars", "stats", "fused_stats", "flops"},
    "scalars": {"load_image", "loads", "schema"},
    "load_image": {"figure", "schema"},
    "profiler": RECORDING - {"stats", "fused_stats", "flops"},
}
NO_TORCH = [
    "errors",
    "schema",
    "files",
    "loads",
    "codec",
    "summary",
    "summary_notes",
    "timeline",
    "reading",
    "reader",
]
NO_TORCH += ["summary_notes", "placement", "render", *sorted(FIGURES), "router_metrics", "tensorboard_plugin"]


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
    wrong = own_parts(modules) - ALLOWED.get(part, ON_TOP | {"cli", "tensorboard_plugin", part}) - {part}
    if part in NO_TORCH or (part == "cli" and path.stem in READING_COMMANDS):
        wrong |= {m for m in modules if m.split(".")[0] in ("torch", "transformers")}
    return wrong


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    assert violations(path, path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("loads.py", "import torch", {"torch"}),
        ("render/text.py", "def f():\n    from torch import nn", {"torch", "torch.nn"}),
        ("schema.py", "from moe_trace.tracer import MoETracer", {"tracer"}),
        ("timeline/merge.py", "import moe_trace.reader", {"reader"}),
        ("stats.py", "from moe_trace import hooks", {"hooks"}),
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

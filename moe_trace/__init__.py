"""Routing of Mixture-of-Experts models, recorded next to the kernels in torch.profiler traces.

Public names are resolved on first use, so importing this package imports neither torch nor numpy and reading
a trace stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moe_trace.data.display.notebook import register_renderers
from moe_trace.data.errors import deprecated
from moe_trace.data.version import __version__ as __version__

_HOME = {
    # recording (needs torch)
    "profile": "moe_trace.record.profiler",
    "tensorboard_trace_handler": "moe_trace.integrations.handler",
    "MoETracer": "moe_trace.record.tracer",
    "ScalarLogger": "moe_trace.integrations.scalar_logger",
    "find_routers": "moe_trace.find.routers",
    "register_adapter": "moe_trace.find.registry",
    "unregister_adapter": "moe_trace.find.registry",
    "RouterOutput": "moe_trace.find.contracts",
    "AdapterMismatch": "moe_trace.find.contracts",
    "MoEProfiler": "moe_trace.simple.profiler",
    "SimpleBenchmark": "moe_trace.simple.benchmark",
    "replace_router": "moe_trace.routing",
    "PruningScores": "moe_trace.record.pruning",
    "MoETraceCallback": "moe_trace.integrations.trainer",
    "RouterSite": "moe_trace.find.routers",
    # files (no torch)
    "merge_into": "moe_trace.timeline.merge",
    "Routes": "moe_trace.data.routes.options",
    "RecordedRoutes": "moe_trace.data.routes.columns",
    "read_routes": "moe_trace.data.routes.reader",
    "read_recording": "moe_trace.read.reader",
    "read_summary": "moe_trace.read.reader",
    "ask": "moe_trace.read.ask",
    "compare": "moe_trace.read.diff",
    "Comparison": "moe_trace.read.diff",
    "Summary": "moe_trace.data.summary",
    "RoutingSample": "moe_trace.data.schema",
    # errors
    "MoETraceError": "moe_trace.data.errors",
    "NoRoutersFound": "moe_trace.data.errors",
}

_RENAMED = {"register_contract": "register_adapter", "Reading": "RouterOutput"}
"""Deprecated names: they still work, with a warning."""

register_renderers(
    {
        "moe_trace.read.analysis.TraceSummary": "moe_trace.show.html.render_fragment",
        "moe_trace.read.diff.comparison.Comparison": "moe_trace.show.notebook.comparison_html",
        "moe_trace.data.summary.Summary": "moe_trace.show.notebook.summary_html",
        "moe_trace.data.calls.sample.RoutingSample": "moe_trace.show.notebook.sample_html",
    }
)

__all__ = [
    "AdapterMismatch",
    "Comparison",
    "MoEProfiler",
    "MoETraceCallback",
    "MoETraceError",
    "MoETracer",
    "NoRoutersFound",
    "PruningScores",
    "RecordedRoutes",
    "RouterOutput",
    "RouterSite",
    "Routes",
    "RoutingSample",
    "ScalarLogger",
    "SimpleBenchmark",
    "Summary",
    "ask",
    "compare",
    "find_routers",
    "merge_into",
    "profile",
    "read_recording",
    "read_routes",
    "read_summary",
    "register_adapter",
    "replace_router",
    "tensorboard_trace_handler",
    "unregister_adapter",
]

if TYPE_CHECKING:
    from moe_trace.data.errors import MoETraceError, NoRoutersFound
    from moe_trace.data.routes.columns import RecordedRoutes
    from moe_trace.data.routes.options import Routes
    from moe_trace.data.routes.reader import read_routes
    from moe_trace.data.schema import RoutingSample
    from moe_trace.data.summary import Summary
    from moe_trace.find.contracts import AdapterMismatch, RouterOutput
    from moe_trace.find.registry import register_adapter, unregister_adapter
    from moe_trace.find.routers import RouterSite, find_routers
    from moe_trace.integrations.handler import tensorboard_trace_handler
    from moe_trace.integrations.scalar_logger import ScalarLogger
    from moe_trace.integrations.trainer import MoETraceCallback
    from moe_trace.read.ask import ask
    from moe_trace.read.diff import Comparison, compare
    from moe_trace.read.reader import read_recording, read_summary
    from moe_trace.record.profiler import profile
    from moe_trace.record.pruning import PruningScores
    from moe_trace.record.tracer import MoETracer
    from moe_trace.routing import replace_router
    from moe_trace.simple.benchmark import SimpleBenchmark
    from moe_trace.simple.profiler import MoEProfiler
    from moe_trace.timeline.merge import merge_into


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        deprecated(f"moe_trace.{name}", f"moe_trace.{_RENAMED[name]}")
        return getattr(importlib.import_module(__name__), _RENAMED[name])
    if name not in _HOME:
        raise AttributeError(f"module 'moe_trace' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*_HOME, "__version__"]

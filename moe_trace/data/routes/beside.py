"""The file of routes that lies beside a trace."""

from __future__ import annotations

from pathlib import Path

from moe_trace.data.routes.file import SUFFIX


def routes_beside(trace: Path) -> Path | None:
    """`NAME.pt.trace.routes.npz` or `NAME.routes.npz` beside `NAME.pt.trace.json`, packed or not."""
    stem = trace.name.removesuffix(".gz").removesuffix(".json")
    for name in (stem, stem.removesuffix(".pt.trace")):
        path = trace.with_name(name + SUFFIX)
        if path.is_file():
            return path
    return None

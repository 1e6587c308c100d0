"""Write everything that a report needs from a trace to a small file next to it.

For runs with many ranks: reduce each trace on the node that wrote it, and collect only the small files.
`report`, `diff`, `placement` and `export` read them if the trace is missing and, because it is faster, if
the trace has not changed since. `check` and `merge` need the traces themselves.

Example: moe-trace reduce runs/ep256
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_trace.data.display.tables import printable
from moe_trace.data.errors import MoETraceError

READS: dict[str, str] = {}  # a pipe has no folder to write the reduced file to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("traces", nargs="+", metavar="PATH", help="traces or folders of traces")


def run(arguments: argparse.Namespace) -> int:
    from moe_trace.read.file.folder import find_traces
    from moe_trace.read.reduced.workers import reduce_traces

    files = [file for path in arguments.traces for file in find_traces(path)]
    broken: list[MoETraceError] = []
    for file, made in zip(files, reduce_traces(files), strict=True):
        if isinstance(made, MoETraceError):
            broken.append(made)
        else:
            print(printable(f"{made}: {_size(made)} for {_size(file)}", 500))
    if len(broken) == len(files):
        raise broken[0]
    for error in broken:
        print(f"moe-trace: warning: left out: {printable(str(error), 500)}", file=sys.stderr)
    return 1 if broken else 0


def _size(file: Path) -> str:
    return f"{file.stat().st_size / 1000:,.0f} kB"

"""Report the routing recorded in a trace, from the file alone.

The report has metrics per layer, a breakdown of time (router, dispatch, experts, combine), speed, the cost
of uneven load, and findings with advice. Several paths are reported one after another; a folder is reported
as one.

Example: moe-trace report runs/demo --html report.html
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moe_trace.cli.arguments import add_filters, add_format, read_chosen, refuse_to_replace
from moe_trace.cli.pipes import TRACE
from moe_trace.data.errors import TraceFileError
from moe_trace.data.files import write_text

if TYPE_CHECKING:
    from moe_trace.read.analysis import TraceSummary
    from moe_trace.show.routes_page import RoutesPart


READS = {"paths": TRACE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="trace (.json or .json.gz) or folder of traces")
    add_format(parser, "csv", help="output format; csv has one row per router call (default: text)")
    add("--html", type=Path, metavar="FILE", help="write a self-contained HTML page instead")
    add("-f", "--force", action="store_true", help="replace FILE if it exists")
    add_filters(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.html is not None:
        refuse_to_replace(arguments.html, force=arguments.force, inputs=arguments.paths)
    summaries = [read_chosen(path, arguments) for path in arguments.paths]
    if arguments.html is not None:
        from moe_trace.show.html import render_page

        routes = [_routes_of(f"f{i}-", path) for i, path in enumerate(arguments.paths)]
        write_text(arguments.html, render_page(summaries, routes))
        print(f"wrote {arguments.html}", file=sys.stderr)
    else:
        print(_render(summaries, arguments.format), end="")
    return 0


def _routes_of(prefix: str, path: str) -> RoutesPart | None:
    """Return the routes next to a trace as a part of the page; an unreadable file is reported and skipped."""
    from moe_trace.data.routes.reader import read_routes, routes_beside
    from moe_trace.show.figures.routes.report import routes_figures
    from moe_trace.show.routes_page import routes_part

    file = routes_beside(Path(path))
    if file is None:
        return None
    try:
        routes = read_routes(file)
    except TraceFileError as error:
        print(f"moe-trace: note: left out of the page: {error}", file=sys.stderr)
        return None
    figures = [routes_figures([group], [file.name]) for group in routes.groups]
    return routes_part(prefix, routes, figures=figures)


def _render(summaries: list[TraceSummary], form: str) -> str:
    if form == "json":
        from moe_trace.data.display.json import json_text
        from moe_trace.show.json import to_plain

        plain = [to_plain(summary) for summary in summaries]
        return json_text(plain[0] if len(plain) == 1 else plain)
    if form == "csv":
        from moe_trace.show.csv import render_csv

        return render_csv(summaries)
    from moe_trace.show.text import render_text

    return "\n".join(render_text(summary) for summary in summaries)

"""`moe-trace report`."""

from __future__ import annotations

import argparse

from moe_trace.cli.reading import reading_progress
from moe_trace.reader import read_summary


class ReportCommand:
    """Say what a trace tells about the routing, from the file alone.

    Example: moe-trace report runs/demo
    """

    name = "report"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("path", metavar="PATH", help="a .json or .json.gz trace, or a folder of traces")
        parser.add_argument("--format", choices=("text", "json"), default="text")

    def run(self, arguments: argparse.Namespace) -> int:
        """Print the report."""
        with reading_progress() as progress:
            summary = read_summary(arguments.path, progress=progress)
        if arguments.format == "json":
            from moe_trace.render.json import render_json

            print(render_json(summary), end="")
        else:
            from moe_trace.render.text import render_text

            print(render_text(summary), end="")
        return 0
